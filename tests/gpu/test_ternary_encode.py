"""The encoder of ternary matrices on a GPU against the CPU's, byte for byte: ragged shapes, every density, stacks of
experts, all types, guard zones, two identical runs, refusals; and what calibrated compression makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_cuda_library import GUARD, SHAPES

from qmoe_core import _C, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from products import stream  # noqa: E402

from qmoe_core.calibration.treatment import PackedStack  # noqa: E402
from qmoe_core.quantize import gptq, packing  # noqa: E402
from qmoe_core.quantize.base import MethodSpec, StackStatistics  # noqa: E402
from qmoe_core.quantize.packing import encode_ternary, pack  # noqa: E402

ZEROS = [0.0, 0.42, 0.8, 0.885, 0.95, 0.99, 1.0]


def draw(
    zeros: float, experts: int, rows: int, cols: int, seed: int, levels: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trits (E, N, K) int8 and levels (E, N, L) float32, on the host."""
    rng = np.random.default_rng(seed)
    share = (1 - zeros) / 2
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (experts, rows, cols), p=[share, zeros, share])
    values = rng.integers(1, 128, (experts, rows, levels)).astype(np.float32) / 64
    if levels == 2:
        values[..., 0] *= -1
    return torch.from_numpy(trits), torch.from_numpy(values)


def matrices_of(trits: torch.Tensor, levels: torch.Tensor) -> list[TernaryMatrix]:
    format = TernaryFormat("pair" if levels.shape[2] == 2 else "symmetric")
    return [TernaryMatrix(format, t.numpy(), v.numpy()) for t, v in zip(trits, levels, strict=True)]


def check(trits: torch.Tensor, levels: torch.Tensor) -> PackedTensor:
    """The record by the GPU, which is twice that by the CPU."""
    expected = PackedTensor.pack(matrices_of(trits, levels)).data
    there = trits.cuda()
    for _ in range(2):
        found = encode_ternary(there, levels)
        assert np.array_equal(found.data, expected)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("levels", [1, 2])
def test_it_is_the_cpus_record(zeros: float, levels: int, shape: tuple[int, int]) -> None:
    check(*draw(zeros, 3, *shape, seed=0, levels=levels)).verify()


def test_random_stacks() -> None:
    rng = np.random.default_rng(1)
    for seed in range(100):
        experts, rows, cols = int(rng.integers(1, 40)), int(rng.integers(1, 200)), int(rng.integers(1, 900))
        check(*draw(float(rng.choice(ZEROS)), experts, rows, cols, seed, int(rng.integers(1, 3))))


@pytest.mark.parametrize("shape", [(1, 1, 100000), (2, 3, 20000), (1, 70000, 3), (1, 6144, 2080), (9, 768, 2048)])
def test_long_rows_and_many(shape: tuple[int, int, int]) -> None:
    check(*draw(0.885, *shape, seed=2))


def test_experts_that_differ_share_a_code() -> None:
    """Most of some experts' symbols have no slots of their own."""
    parts = [draw(zeros, 4, 130, 300, seed=3) for zeros in (1.0, 0.999, 0.99, 0.2, 1.0)]
    check(torch.cat([trits for trits, _ in parts]), torch.cat([levels for _, levels in parts]))
    ones = torch.ones(2, 40, 100, dtype=torch.int8)
    check(ones, torch.ones(2, 40, 1))
    check(-ones, torch.ones(2, 40, 1))


def test_some_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trits, levels = draw(0.885, 7, 40, 300, seed=4)
    monkeypatch.setattr(packing, "SCRATCH", 1)
    check(trits, levels)


def test_types_and_strides() -> None:
    trits, levels = draw(0.8, 3, 64, 200, seed=5)
    expected = check(trits, levels).data
    for dtype in (torch.int8, torch.bfloat16, torch.float16, torch.float32):
        for there in (trits.to(dtype).cuda(), trits.to(dtype).cuda().transpose(1, 2).contiguous().transpose(1, 2)):
            for values in (levels, levels.cuda(), levels.bfloat16().cuda()):
                assert np.array_equal(encode_ternary(there, values).data, expected)


class Encoder:
    """By the bindings, with guards around everything that is written."""

    def __init__(self, trits: torch.Tensor, levels: torch.Tensor) -> None:
        counts = torch.full((29 + 2 * GUARD,), -7, device="cuda")
        at = counts.data_ptr() + 8 * GUARD
        there = trits.cuda()
        _C.cuda_ternary_census(there.data_ptr(), trits.shape[0] * trits.shape[1], trits.shape[2], at, stream())
        torch.cuda.synchronize()
        assert (counts[:GUARD] == -7).all() and (counts[-GUARD:] == -7).all()
        self.counts = counts[GUARD:-GUARD].cpu().numpy().view(np.uint64)
        self.encoder = _C.CudaTernaryEncoder(levels.numpy(), trits.shape[2], self.counts)

    def record(self, trits: torch.Tensor) -> np.ndarray:
        encoder, experts, there = self.encoder, len(trits), trits.cuda()
        count, size = experts * encoder.offsets, experts * encoder.scratch
        tables = torch.from_numpy(encoder.tables).cuda()
        offsets = torch.full((count + experts + 2 * GUARD,), -7, dtype=torch.int32, device="cuda")
        scratch = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        at = offsets.data_ptr() + 4 * GUARD
        room = scratch.data_ptr() + GUARD, size
        encoder.code(there.data_ptr(), experts, tables.data_ptr(), at, at + 4 * count, *room, stream())
        torch.cuda.synchronize()
        assert (offsets[:GUARD] == -7).all() and (offsets[-GUARD:] == -7).all(), "wrote outside the offsets"
        found = offsets[GUARD:-GUARD].cpu().numpy().view(np.uint32)
        self.misfits = found[count:]
        first_words, nbytes = encoder.places(found[:count], found[count:])
        places = torch.from_numpy(first_words.view(np.int64)).cuda()
        out = torch.full((nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        out[GUARD:-GUARD] = 0
        encoder.words(experts, at, *room, places.data_ptr(), out.data_ptr() + GUARD, stream())
        torch.cuda.synchronize()
        assert (out[:GUARD] == 0xA5).all() and (out[-GUARD:] == 0xA5).all(), "wrote outside the words"
        assert (scratch[:GUARD] == 0xA5).all() and (scratch[-GUARD:] == 0xA5).all(), "wrote outside the scratch"
        record = np.full(encoder.head + nbytes, 0xA5, dtype=np.uint8)
        record[encoder.head :] = out[GUARD:-GUARD].cpu().numpy()
        encoder.finish(found[:count], record)
        return record


@pytest.mark.parametrize("shape", SHAPES)
def test_guards(shape: tuple[int, int]) -> None:
    for zeros in (0.2, 0.885, 0.99):
        trits, levels = draw(zeros, 3, *shape, seed=6)
        expected = PackedTensor.pack(matrices_of(trits, levels)).data
        assert np.array_equal(Encoder(trits, levels).record(trits), expected)


def test_other_matrices_than_the_spec_is_of_are_refused() -> None:
    sparse, levels = draw(1.0, 2, 33, 100, seed=7)
    encoder = Encoder(sparse, levels)
    dense = sparse.clone()
    dense[1, 5, 7] = 1
    with pytest.raises(QmoeError, match="the spec is of other matrices"):
        encoder.record(dense)
    dense[1, 5, 7] = 3
    with pytest.raises(QmoeError, match="the spec is of other matrices"):
        encoder.record(dense)
    encoder.record(sparse)
    with pytest.raises(QmoeError, match="E_SHAPE"):
        encoder.encoder.places(np.zeros(1, np.uint32), np.zeros(2, np.uint32))
    with pytest.raises(QmoeError, match="E_SHAPE"):  # more matrices than the encoder is of
        encoder.record(torch.cat([sparse, sparse]))
    with pytest.raises(QmoeError, match="E_SHAPE"):  # no scratch
        there = sparse.cuda()
        encoder.encoder.code(there.data_ptr(), 2, 0, 0, 0, 0, 0, stream())
    counts = encoder.counts.copy()
    counts[3] = 10**6
    with pytest.raises(QmoeError, match="E_VALUE"):
        _C.CudaTernaryEncoder(levels.numpy(), 100, counts)


@pytest.mark.parametrize("value", [2, -2, 127, -128])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 4, 6), (1, 2, 3)])
def test_what_is_no_trit(value: int, at: tuple[int, int, int]) -> None:
    trits, levels = draw(0.885, 2, 5, 7, seed=8)
    trits[at] = value
    with pytest.raises(QmoeError, match="E_VALUE"):
        encode_ternary(trits.cuda(), levels)


def refused(code: str, trits: torch.Tensor, levels: torch.Tensor) -> None:
    with pytest.raises(QmoeError, match=code):
        encode_ternary(trits, levels)


def test_refusals() -> None:
    trits, levels = draw(0.885, 2, 5, 7, seed=9)
    there = trits.cuda()
    refused("E_NO_KERNEL", trits, levels)
    refused("E_SHAPE", there[0], levels)
    refused("E_SHAPE", there[:, :, :0], levels)
    refused("E_SHAPE", there, levels[0])
    refused("E_SHAPE", there, levels[:, :4])
    refused("E_SHAPE", there, levels[:, :, :0])
    refused("E_SHAPE", there, torch.cat([levels, levels], 2))
    refused("E_DTYPE", there.int(), levels)
    refused("E_DTYPE", there, levels.half())
    refused("E_DTYPE", there, levels.double())
    for value in (0.5, 300.0, float("nan"), float("inf")):
        halves = there.float()
        halves[1, 2, 3] = value
        refused("E_VALUE", halves, levels)
    for level in (float("nan"), float("inf"), 1 + 2**-12):
        levels[1, 2, 1] = level
        refused("E_VALUE", there, levels)


def quantized(experts: int = 5, rows: int = 48, cols: int = 130) -> list[Any]:
    generator = torch.Generator().manual_seed(10)
    weight = torch.randn(experts, rows, cols, generator=generator).cuda()
    x = torch.randn(experts, 300, cols, generator=generator).cuda()
    tokens = torch.full((experts,), 300)
    statistics = StackStatistics(tokens, torch.bmm(x.transpose(1, 2), x))
    pairs = gptq.quantize_stack(weight, statistics, MethodSpec("gptq", TernaryFormat(), {"rate": 2.0}))
    return [matrix for matrix, _ in pairs]


def test_calibrated_matrices_are_encoded_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = quantized()
    expected = PackedTensor.pack(matrices).data
    calls = []

    def counting(*arguments: Any) -> PackedTensor:
        calls.append(1)
        return encode_ternary(*arguments)

    monkeypatch.setattr(packing, "encode_ternary", counting)
    assert np.array_equal(pack(matrices).data, expected)
    stack = PackedStack(SimpleNamespace(kind="experts", shape=(5, 48, 130)), None, None)  # type: ignore[arg-type]
    for matrix in matrices:
        stack.add(matrix)
    assert all(matrix.there.data_ptr() == stack._there[e].data_ptr() for e, matrix in enumerate(stack.matrices))
    assert np.array_equal(np.concatenate(stack.pack().pieces), expected)
    assert len(calls) == 2
    matrices[3].there = None  # of another process
    assert np.array_equal(pack(matrices).data, expected)

    def none(*_: Any) -> PackedTensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(packing, "encode_ternary", none)
    assert np.array_equal(pack(quantized()).data, expected)
    assert len(calls) == 2
