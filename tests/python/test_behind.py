"""What goes on behind a calibration: work in a thread of its own, weights read ahead, records packed part by part."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qmoe_core import IntFormat, IntMatrix, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix
from qmoe_core.behind import SWITCH_SECONDS, Behind, quick_switches
from qmoe_core.calibration import weights_ahead
from qmoe_core.calibration.weights_ahead import AHEAD, Piece, WeightsAhead
from qmoe_core.formats import RecordPart, RecordPieces
from qmoe_core.store import crc32c


def fail() -> None:
    raise OSError("no")


def test_results_come_in_order_and_nothing_is_done_behind_a_failure():
    behind, done = Behind(ahead=8), []
    first = behind.do(lambda: done.append(1) or "one")
    assert behind.result(first) == "one" and done == [1]
    go = threading.Event()
    waiting = behind.do(go.wait)
    failing, last = behind.do(fail), behind.do(lambda: done.append(2))
    go.set()
    assert waiting.result() is True
    for future in (failing, last):
        with pytest.raises(OSError, match="no"):
            behind.result(future)
    with pytest.raises(OSError, match="no"):
        behind.wait()
    behind.close()
    assert done == [1]


def test_switches_are_quick_inside_only():
    before = sys.getswitchinterval()
    with contextlib.suppress(OSError), quick_switches():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        fail()
    assert sys.getswitchinterval() == before


class Stream:
    """Stands in for a CUDA stream."""

    def record_event(self) -> str:
        return "event"

    def wait_event(self, event: str) -> None:
        assert event == "event"


@pytest.fixture(params=["cpu", "cuda"])
def ahead(request, monkeypatch):
    """`WeightsAhead` on a CPU, or as on a GPU but for streams, and the notes of what was read."""
    read: list[int] = []
    if request.param == "cuda":
        monkeypatch.setattr(weights_ahead.torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(weights_ahead.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(weights_ahead.torch.cuda, "current_stream", lambda device: Stream())
    weights = WeightsAhead(request.param)

    def piece(number: int) -> Piece:
        def made() -> list:
            read.append(number)
            if number == 99:
                raise QmoeError("E_IO", "cannot be read")
            return [SimpleNamespace(number=number, record_stream=lambda stream: None)]

        return Piece(made)

    yield weights, piece, read
    weights.close()


def numbers(pieces: list) -> list[int]:
    return [tensor.number for tensor in pieces]


def test_weights_are_read_in_order_some_ahead(ahead):
    weights, piece, read = ahead
    pieces = [piece(number) for number in range(8)]
    weights.plan(pieces[:5])
    weights.plan(pieces[5:])
    for number, wanted in enumerate(pieces):
        assert numbers(weights.next(wanted)) == [number]
        assert len(read) <= number + 1 + AHEAD
    assert read == list(range(8))


def test_weights_asked_for_in_another_order_and_forgotten(ahead):
    weights, piece, read = ahead
    pieces = [piece(number) for number in range(6)]
    weights.plan(pieces)
    assert [numbers(weights.next(pieces[at])) for at in (1, 5, 0, 2)] == [[1], [5], [0], [2]]
    weights.clear()
    weights.plan([pieces[4]])
    assert numbers(weights.next(pieces[4])) == [4] and read.count(4) <= 2


def test_an_error_of_reading_comes_where_the_weights_are_asked_for(ahead):
    weights, piece, _ = ahead
    good, bad = piece(0), piece(99)
    weights.plan([good, bad])
    assert numbers(weights.next(good)) == [0]
    with pytest.raises(QmoeError, match="cannot be read"):
        weights.next(bad)


def int_matrices(count: int, rows: int, cols: int, bits: int = 4) -> list[IntMatrix]:
    random, format = np.random.default_rng(count), IntFormat(bits, 32)
    groups = -(-cols // 32)
    return [
        IntMatrix(
            format,
            random.integers(0, 2**bits, (rows, cols), dtype=np.uint8),
            random.random((rows, groups)).astype(np.float16).astype(np.float32),
            random.integers(0, 2**bits, (rows, groups), dtype=np.uint8),
        )
        for _ in range(count)
    ]


def ternary_matrices(count: int, rows: int, cols: int) -> list[TernaryMatrix]:
    random = np.random.default_rng(count)
    levels = torch.rand(rows, 2).bfloat16().float().numpy() * np.float32([-1, 1])
    return [
        TernaryMatrix(TernaryFormat(), random.integers(-1, 2, (rows, cols)).astype(np.int8), levels)
        for _ in range(count)
    ]


def joined(pieces: RecordPieces) -> np.ndarray:
    data = np.concatenate(pieces.pieces)
    assert pieces.nbytes == data.nbytes and pieces.crc32c == crc32c(data)
    return data


@pytest.mark.parametrize("counts", [(3,), (2, 1), (1, 4, 2)])
@pytest.mark.parametrize("shape", [(3, 64), (5, 70), (1, 1)])
def test_int_matrices_packed_part_by_part_make_the_same_record(counts, shape):
    matrices = [int_matrices(count, *shape, bits) for count, bits in zip(counts, (4, 4, 2), strict=False)]
    record = joined(RecordPieces.join([RecordPart.pack(some, threads=2) for some in matrices]))
    assert record.tobytes() == PackedTensor.pack([matrix for some in matrices for matrix in some]).data.tobytes()


def test_ternary_parts_make_a_sound_record_with_a_code_for_each():
    parts = [ternary_matrices(2, 40, 50), ternary_matrices(3, 40, 50)]
    packed = PackedTensor(joined(RecordPieces.join([RecordPart.pack(part) for part in parts])))
    packed.verify()
    for expert, matrix in enumerate(matrix for part in parts for matrix in part):
        np.testing.assert_array_equal(packed.decode(expert), matrix.dequantize())


def test_parts_of_other_shapes_do_not_join():
    a, b = RecordPart.pack(int_matrices(1, 3, 64)), RecordPart.pack(int_matrices(1, 4, 64))
    for parts in ([a, b], []):
        with pytest.raises(QmoeError, match="E_SHAPE"):
            RecordPieces.join(parts)
