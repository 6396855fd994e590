"""Products of int matrices on a GPU against float64: every width, group and zero, ragged shapes, poisoned outputs, two
identical runs."""

from __future__ import annotations

import numpy as np
import pytest
from test_cuda_library import int_record

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from products import Linear, check_linear as check  # noqa: E402, I001

SHAPES = [(1, 1), (5, 7), (33, 129), (64, 256), (136, 768), (17, 4096), (300, 2080)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("zero_point", [False, True])
def test_it_is_the_product(shape: tuple[int, int], bits: int, group: int, zero_point: bool) -> None:
    packed = int_record(bits, group, zero_point, *shape, experts=1)
    for tokens, dtype in [(1, "bfloat16"), (8, "float16"), (13, "bfloat16")]:
        check(packed, tokens, dtype, seed=shape[0])


@pytest.mark.parametrize("shape", [*SHAPES, (700, 1500)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("zero_point", [False, True])
def test_it_is_the_product_of_many_tokens(shape: tuple[int, int], bits: int, group: int, zero_point: bool) -> None:
    packed = int_record(bits, group, zero_point, *shape, experts=1)
    for tokens, dtype in [(1, "float16"), (17, "bfloat16"), (64, "float16"), (130, "bfloat16")]:
        check(packed, tokens, dtype, seed=shape[0], biased=tokens == 17, kernel="many")


@pytest.mark.parametrize("shape", [(128, 14336), (1000, 9000), (260, 50000), (4096, 4096), (9000, 130)])
def test_many_tokens_of_matrices_that_are_cut(shape: tuple[int, int]) -> None:
    """Several blocks of threads share a unit, or have several."""
    for bits in (2, 4):
        for tokens in (16, 60, 300):
            check(int_record(bits, 128, True, *shape, experts=1), tokens, "bfloat16", 0, kernel="many")


@pytest.mark.parametrize("shape", [(300, 14336), (40, 40000), (9000, 130), (1, 70000)])
def test_long_rows_and_many(shape: tuple[int, int]) -> None:
    """More columns than there is room for in shared memory, and more tiles than a multiprocessor takes in one round."""
    for tokens in (1, 8, 16):
        check(int_record(4, 128, True, *shape, experts=1), tokens, "bfloat16", 0)
        check(int_record(2, 0, True, *shape, experts=1), tokens, "float16", 0)


@pytest.mark.parametrize("part", range(20))
def test_random_configurations(part: int) -> None:
    """2,000 of them."""
    rng = np.random.default_rng(part)
    for seed in range(100 * part, 100 * (part + 1)):
        rows, cols = int(rng.integers(1, 700)), int(rng.integers(1, 3000))
        packed = int_record(
            int(rng.choice([2, 3, 4, 8])),
            int(rng.choice([0, 32, 64, 128])),
            bool(rng.integers(2)),
            rows,
            cols,
            str(rng.choice(["float16", "bfloat16"])),
            bool(rng.integers(2)),
            experts=1,
        )
        dtype = str(rng.choice(["float16", "bfloat16"]))
        kernel = str(rng.choice(["auto", "few", "many"]))
        check(packed, int(rng.integers(1, 140)), dtype, seed, biased=bool(rng.integers(2)), kernel=kernel)


def test_no_tokens_and_what_has_no_kernel() -> None:
    linear = Linear(int_record(4, 128, False, 33, 129, experts=1))
    assert linear(torch.empty(0, 129, dtype=torch.bfloat16, device="cuda")).shape == (0, 33)
    with pytest.raises(QmoeError, match="E_DTYPE"):
        linear(torch.zeros(1, 129, device="cuda"))
    for packed in (int_record(4, 16, False, 33, 129), int_record(4, 32, False, 33, 129, "float32")):
        with pytest.raises(QmoeError, match="E_NO_KERNEL"):
            _C.CudaInt(packed.data)
    with pytest.raises(QmoeError, match="E_VALUE"):
        Linear(int_record(4, 128, False, 33, 129))(torch.zeros(1, 129, dtype=torch.bfloat16, device="cuda"))


def test_extreme_codes() -> None:
    for bits in (2, 3, 4, 8):
        codes = np.full((40, 256), 2**bits - 1, np.uint8)
        codes[::2] = 0
        matrix = IntMatrix(IntFormat(bits, 64, False), codes, np.full((40, 4), 2.0, np.float32), None)
        check(PackedTensor.pack([matrix]), 2, "float16", bits)
