"""Encoding and decompression of ternary matrices on a GPU: weights per second.

    python bench/gpu/ternary_codec.py [--zeros 0.8 0.885 0.95] [--output FILE]

Trits are random. Every record is checked against the CPU's encoder, byte for byte, and what is decompressed against its
decoder (of a stack one expert).

encode      the kernels alone, that is census, coding and words: medians of CUDA graph replays
whole       `encode_ternary`, from trits on the GPU to the record on the host, by the clock; of int8 and of bfloat16
unpack      from the layout of the products to bfloat16, in a CUDA graph; of a stack all experts
dequantize  from the record to bfloat16, likewise
cpu         the CPU's encoder on all threads, by the clock, once

Graphs rotate over copies larger together than the second-level cache, of what is read and of what is written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, microseconds, write_results

from qmoe_core import _C, PackedTensor, TernaryFormat, TernaryMatrix
from qmoe_core.quantize.packing import encode_ternary

SHAPES = ((1, 6144, 2080), (1, 2080, 6144), (1, 14336, 4096), (1, 4096, 14336), (128, 768, 2048), (128, 2048, 768))
WHOLE = 7  # times that a whole encoding is done


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def sample(zeros: float, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Trits (E, N, K) int8 on the GPU and levels (E, N, 2) float32 on the host."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    drawn, share = torch.rand(shape, device="cuda", generator=generator), (1 - zeros) / 2
    trits = (drawn < share).to(torch.int8) - (drawn > 1 - share).to(torch.int8)
    levels = torch.randint(64, 128, (*shape[:2], 2), generator=torch.Generator().manual_seed(0)) / 64
    return trits, levels * torch.tensor([-1.0, 1.0])


def copies_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    count = max(2, -(-CACHE_BYTES // tensor.nbytes)) if tensor.nbytes < CACHE_BYTES else 1
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def encode(trits: torch.Tensor, levels: torch.Tensor, packed: PackedTensor) -> dict[str, float]:
    """Microseconds of the kernels."""
    experts, rows, cols = trits.shape
    counts = torch.empty(29, dtype=torch.int64, device="cuda")
    _C.cuda_ternary_census(trits.data_ptr(), experts * rows, cols, counts.data_ptr(), stream())
    encoder = _C.CudaTernaryEncoder(levels.numpy(), cols, counts.cpu().numpy().view(np.uint64))
    tables = torch.from_numpy(encoder.tables).cuda()
    scratch = torch.empty(experts * encoder.scratch, dtype=torch.uint8, device="cuda")
    offsets = torch.empty(experts, encoder.offsets, dtype=torch.int32, device="cuda")
    misfits = torch.empty(experts, dtype=torch.int32, device="cuda")
    room = scratch.data_ptr(), scratch.numel()

    def code(source: torch.Tensor) -> None:
        encoder.code(
            source.data_ptr(), experts, tables.data_ptr(), offsets.data_ptr(), misfits.data_ptr(), *room, stream()
        )

    code(trits)
    host = offsets.cpu().numpy().view(np.uint32), misfits.cpu().numpy().view(np.uint32)
    first_words, size = encoder.places(*host)
    assert encoder.head + size == packed.nbytes
    places = torch.from_numpy(first_words.view(np.int64)).cuda()
    sources = copies_of(trits)
    outputs = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in sources]

    def run() -> None:
        for source, out in zip(sources, outputs, strict=True):
            _C.cuda_ternary_census(source.data_ptr(), experts * rows, cols, counts.data_ptr(), stream())
            code(source)
            encoder.words(experts, offsets.data_ptr(), *room, places.data_ptr(), out.data_ptr(), stream())

    return microseconds(run, len(sources))


def clock(run: Callable[[], Any], times: int) -> float:
    """Median, microseconds, behind a first one."""
    taken = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begin) * 1e6)
    return median(taken[1:])


def decompress(packed: PackedTensor) -> dict[str, float]:
    """Microseconds for all experts, by both ways."""
    expected = torch.from_numpy(packed.decode(packed.experts - 1)).bfloat16()
    weights = packed.rows * packed.cols
    matrix, record = _C.CudaTernary(packed.data, "plain", torch.get_num_threads()), _C.CudaRecord(packed.data)
    table = torch.from_numpy(record.table(0).view(np.int32)).cuda()
    streams = copies_of(torch.from_numpy(matrix.take()).cuda())
    stored = copies_of(torch.from_numpy(packed.data).cuda())
    outputs = copies_of(torch.empty(packed.experts, weights, dtype=torch.bfloat16, device="cuda"))

    def unpack() -> None:
        for i, source in enumerate(streams):
            out = outputs[i % len(outputs)]
            matrix.unpack(source.data_ptr(), 0, out.data_ptr(), "bfloat16", stream(), packed.experts)

    def dequantize() -> None:
        for i, source in enumerate(stored):
            out = outputs[i % len(outputs)]
            for e in range(packed.experts):
                place = out[e].data_ptr()
                record.dequantize(e, source.data_ptr(), table.data_ptr(), place, "bfloat16", stream())

    result = {}
    for name, run, count in (("unpack", unpack, len(streams)), ("dequantize", dequantize, len(stored))):
        outputs[0].fill_(float("nan"))
        result[f"{name}_us"] = microseconds(run, count)["median_us"]
        assert torch.equal(outputs[0][-1].cpu(), expected.flatten()), name
    return result


def measure(zeros: float, shape: tuple[int, int, int]) -> dict[str, Any]:
    trits, levels = sample(zeros, shape)
    format, on_host = TernaryFormat("pair"), trits.cpu().numpy()
    matrices = [TernaryMatrix(format, t, v.numpy()) for t, v in zip(on_host, levels, strict=True)]
    begin = time.perf_counter()
    packed = PackedTensor.pack(matrices)
    row: dict[str, Any] = {"shape": list(shape), "zeros": zeros, "weights": trits.numel()}
    row |= {"bits": packed.bits_per_weight, "cpu_us": (time.perf_counter() - begin) * 1e6}
    halves = trits.bfloat16()
    for found in (encode_ternary(trits, levels), encode_ternary(halves, levels)):
        assert np.array_equal(found.data, packed.data), "not the CPU's bytes"
    row |= {f"encode_{name}": value for name, value in encode(trits, levels, packed).items()}
    row["whole_us"] = clock(partial(encode_ternary, trits, levels), WHOLE)
    row["whole_bfloat16_us"] = clock(partial(encode_ternary, halves, levels), WHOLE)
    row |= decompress(packed)
    for name in ("encode_median", "whole", "whole_bfloat16", "unpack", "dequantize", "cpu"):
        row[f"{name.removesuffix('_median')}_weights_per_second"] = row["weights"] / row[f"{name}_us"] * 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.885, 0.95])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows, begin = [], time.perf_counter()
    for shape in SHAPES:
        for zeros in arguments.zeros:
            row = measure(zeros, shape)
            rows.append(row)
            torch.cuda.empty_cache()
            cells = [
                f"{name} {row[f'{name}_weights_per_second'] / 1e9:.1f}"
                for name in ("encode", "whole", "whole_bfloat16", "unpack", "dequantize", "cpu")
            ]
            print(f"{'x'.join(map(str, shape))} {zeros}: {row['bits']:.3f} bits; G weights/s:", end=" ")
            print(f"{', '.join(cells)} ({time.perf_counter() - begin:.0f} s)", flush=True)
    if arguments.output:
        write_results(arguments.output, "ternary-codec-gpu", rows, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
