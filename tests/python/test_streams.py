"""The layout of ternary matrices for GPUs, made on the host (what is in it: tests/cpp/test_streams.cpp)."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix


def ternary(rows: int, cols: int, zeros: float = 0.885, experts: int = 2) -> PackedTensor:
    rng = np.random.default_rng(rows)
    share = (1 - zeros) / 2
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (experts, rows, cols), p=[share, zeros, share])
    levels = np.ones((rows, 1), np.float32)
    return PackedTensor.pack([TernaryMatrix(TernaryFormat("symmetric"), own, levels) for own in trits])


def test_bytes_do_not_depend_on_threads_and_are_given_away_once() -> None:
    packed = ternary(200, 700)
    one, many = _C.CudaTernary(packed.data), _C.CudaTernary(packed.data, "halves", 3)
    assert one.shape == {"gap_bits": 5, "segments": 1}
    streams = one.take()
    assert streams.dtype == np.uint8 and len(streams) == one.bytes == many.bytes
    assert np.array_equal(streams, many.take())
    with pytest.raises(QmoeError, match="E_VALUE"):
        one.take()


def test_below_one_bit() -> None:
    assert _C.CudaTernary(ternary(512, 4096).data).bytes * 8 < 0.81 * 2 * 512 * 4096


def test_refusals() -> None:
    with pytest.raises(QmoeError, match="E_SHAPE"):
        _C.CudaTernary(ternary(33, 40).data, "interleaved")
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        _C.CudaTernary(ternary(1, 65536).data)
    codes, scales = np.zeros((4, 64), np.uint8), np.ones((4, 1), np.float32)
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        _C.CudaTernary(PackedTensor.pack([IntMatrix(IntFormat(4, 64, False), codes, scales, None)]).data)
    with pytest.raises(QmoeError, match="E_TRUNCATED"):
        _C.CudaTernary(ternary(20, 40).data[:100])
