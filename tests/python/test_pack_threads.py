"""Records are built on several threads; their bytes must not depend on how many."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix


def matrices(rows: int, cols: int, count: int) -> list[IntMatrix | TernaryMatrix]:
    rng = np.random.default_rng(5)
    made: list[IntMatrix | TernaryMatrix] = []
    for _ in range(count):
        codes, scales, zeros = _C.rtn_int(rng.standard_normal((rows, cols)).astype(np.float32), 4, 128, True)
        made.append(IntMatrix(IntFormat(4, 128), codes, scales, zeros))
        trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, cols), p=[0.1, 0.8, 0.1])
        made.append(TernaryMatrix(TernaryFormat("pair"), trits, np.tile(np.float32([-0.5, 0.25]), (rows, 1))))
    return made


@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (128, 512)])
def test_bytes_do_not_depend_on_threads(shape: tuple[int, int]) -> None:
    fields = [matrix._fields() for matrix in matrices(*shape, 6)]
    expected = _C.build_record(*shape, fields, 1)
    for threads in (2, 5, 64, 0):
        assert (_C.build_record(*shape, fields, threads) == expected).all()
    _C.inspect_record(expected, verify=True)


def test_a_bad_matrix_is_refused_alike_on_any_number_of_threads() -> None:
    fields = [matrix._fields() for matrix in matrices(9, 40, 3)]
    fields[3]["trits"] = np.full((9, 40), 2, np.int8)
    for threads in (1, 4):
        with pytest.raises(QmoeError) as error:
            _C.build_record(9, 40, fields, threads)
        assert error.value.code == "E_VALUE"


def test_trits_on_no_gpu_are_the_cpus() -> None:
    """Records are by the CPU's encoder where trits are not on a GPU; what is on one stays out of copies."""
    torch = pytest.importorskip("torch")
    from qmoe_core.quantize import packing

    made = matrices(9, 40, 3)[1::2]
    expected = PackedTensor.pack(made).data
    assert (packing.pack(made, 2).data == expected).all()
    for matrix in made:
        matrix.there = torch.from_numpy(matrix.trits)  # type: ignore[union-attr]
    assert (packing.pack(made).data == expected).all()
    copies = pickle.loads(pickle.dumps(made))
    assert all(matrix.there is None for matrix in copies) and (packing.pack(copies).data == expected).all()
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        packing.encode_ternary(torch.zeros(1, 2, 3, dtype=torch.int8), torch.ones(1, 2, 1))
    assert packing._stack_there([]) is None
