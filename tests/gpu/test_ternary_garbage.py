"""10,000 ternary payloads of noise through the GPU's decompression, and some of them through products: what the CPU's
decoder makes of them, between intact guards (tests/cpp/test_garbage.cpp is the CPU's way)."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from test_cuda_library import GUARD

from qmoe_core import _C, PackedTensor, TernaryFormat, TernaryMatrix

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from products import Layer, OnDevice, check_linear, name_of, stream  # noqa: E402

from qmoe_core.runtime.gating import Gating  # noqa: E402

STACKS, EXPERTS = 50, 200


def garbage(rng: np.random.Generator, experts: int, rows: int, cols: int) -> PackedTensor:
    """A record that is sound but for its payloads: each is noise, or ones, or zeros, or has a few bits flipped; and in
    half of them blocks begin anywhere that the structure allows, so that some run out of words and others keep some."""
    zeros = float(rng.choice([0.0, 0.3, 0.7, 0.885, 0.97, 1.0]))
    share, levels = (1 - zeros) / 2, int(rng.integers(1, 3))
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (experts, rows, cols), p=[share, zeros, share])
    values = rng.integers(64, 128, (experts, rows, levels)).astype(np.float32) / 64
    if levels == 2:
        values[..., 0] *= -1
    format = TernaryFormat("pair" if levels == 2 else "symmetric")
    packed = PackedTensor.pack([TernaryMatrix(format, t, v) for t, v in zip(trits, values, strict=True)])
    data, spec = packed.data.copy(), packed.info["specs"][0]
    groups = 32 // spec["segments"]
    block_rows = groups * spec["rows_per_lane"]
    blocks = -(-rows // block_rows)
    offsets_at = -(-sum(-(-rows * bits // 8) for bits in spec["level_bits"]) // 4) * 4
    lanes = [min(groups, rows - b * block_rows) * spec["segments"] for b in range(blocks)]
    head = 64 + 80 + 16 * experts
    for expert, entry in enumerate(packed.info["entries"]):
        matrix = data[entry["offset"] : entry["offset"] + entry["bytes"]]
        offsets = matrix[offsets_at : offsets_at + 4 * (blocks + 1)].view(np.uint32)
        first = offsets_at + 4 * (blocks + 1)
        payload = matrix[first : first + 2 * int(offsets[-1])]
        style = int(rng.integers(5))
        if style < 3:
            payload[:] = rng.integers(0, 256, payload.size, dtype=np.uint8) if style == 0 else 255 * (style - 1)
        else:
            at = rng.integers(0, payload.size, 3)
            payload[at] ^= (1 << rng.integers(0, 8, 3)).astype(np.uint8)
        if rng.integers(2):
            for b in range(1, blocks):
                low, most = int(offsets[b - 1]) + lanes[b - 1], int(offsets[b + 1]) - lanes[b]
                if low <= most:
                    offsets[b] = rng.integers(low, most + 1)
        struct.pack_into("<I", data, 64 + 80 + 16 * expert + 12, _C.crc32c(matrix))
    struct.pack_into("<I", data, 40, 0)
    struct.pack_into("<I", data, 40, _C.crc32c(data[:head]))
    return PackedTensor(data)


class Guarded:
    """An output (N, K) for each expert, poisoned, with guards before and behind it."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        self.size = packed.rows * packed.cols
        shape = packed.experts, self.size + 2 * GUARD
        self.room = torch.full(shape, float("nan"), dtype=dtype, device="cuda")

    def at(self, expert: int) -> int:
        return int(self.room[expert, GUARD:].data_ptr())

    def check(self, expected: torch.Tensor) -> None:
        found = self.room.cpu()
        assert found[:, :GUARD].isnan().all() and found[:, -GUARD:].isnan().all(), "wrote outside the output"
        assert torch.equal(found[:, GUARD:-GUARD], expected.to(found.dtype).flatten(1))


def check_decompression(packed: PackedTensor, dtype: torch.dtype) -> None:
    decoded = [_C.decode_record(packed.data, e, check_crc=False) for e in range(packed.experts)]
    expected = torch.from_numpy(np.stack(decoded))
    stored, unpacked = Guarded(packed, dtype), Guarded(packed, dtype)
    record, name = _C.CudaRecord(packed.data), name_of(dtype)
    data = torch.from_numpy(packed.data).cuda()
    table = torch.from_numpy(record.table(0).view(np.int32)).cuda()  # all experts share a spec
    there = OnDevice(packed)
    for expert in range(packed.experts):
        record.dequantize(expert, data.data_ptr(), table.data_ptr(), stored.at(expert), name, stream())
        there.matrix.unpack(there.weights, expert, unpacked.at(expert), name, stream())
    torch.cuda.synchronize()
    stored.check(expected)
    unpacked.check(expected)


def test_garbage_is_decompressed_as_on_the_cpu_and_multiplied() -> None:
    rng = np.random.default_rng(0)
    types = [torch.float32, torch.bfloat16, torch.float16]
    for seed in range(STACKS):
        rows, cols = int(rng.integers(1, 81)), int(rng.integers(1, 91))
        packed = garbage(rng, EXPERTS, rows, cols)
        check_decompression(packed, types[seed % 3])
        for expert in rng.integers(0, EXPERTS, 2).tolist():
            one, dtype = packed.slice_experts(expert, 1), str(rng.choice(["float16", "bfloat16"]))
            check_linear(one, int(rng.integers(1, 5)), dtype, seed, biased=bool(rng.integers(2)), kernel="few")


def test_layers_of_garbage() -> None:
    rng = np.random.default_rng(1)
    for seed in range(4):
        hidden, width = int(rng.integers(1, 91)), int(rng.integers(1, 81))
        first, second = garbage(rng, EXPERTS, width, hidden), garbage(rng, EXPERTS, hidden, width)
        Layer(first, second, Gating("plain", "relu"), biased=seed % 2 == 1).check(4, 3, seed)
