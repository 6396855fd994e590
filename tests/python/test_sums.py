"""Sums over tokens against float64: symmetric ones that are made by halves, and rows in several pieces. And memory that
they leave."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_core import _C

psutil = pytest.importorskip("psutil")
torch = pytest.importorskip("torch")

from qmoe_core.calibration import sums  # noqa: E402


@pytest.mark.parametrize("columns", [1, 5, sums.BLOCK, sums.BLOCK + 1, 3 * sums.BLOCK - 7])
@pytest.mark.parametrize("rows", [0, 1, 90])
def test_symmetric_sums_equal_float64(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "ROWS", 40)
    generator = torch.Generator().manual_seed(0)
    total, expected = torch.zeros(columns, columns), torch.zeros(columns, columns, dtype=torch.float64)
    for first in range(sums.BLOCK, columns, sums.BLOCK):
        total[first:, first - sums.BLOCK : first] = float("nan")  # what `complete` fills in
    for _ in range(2):
        x = torch.randn(rows, columns, generator=generator)
        sums.add_squares(total, x)
        expected += x.double().T @ x.double()
    sums.complete(total)
    assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_products_add_up_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "ROWS", 40)
    left, right = torch.randn(90, 33), torch.randn(90, 33)
    total = torch.ones(33, 33)
    sums.add_products(total, left, right)
    assert torch.allclose(total.double(), 1 + left.double().T @ right.double(), rtol=1e-5, atol=1e-4)


def test_free_memory_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [np.ones(1 << 13) for _ in range(4000)]  # 64 KiB each: none has a mapping of its own
    kept = blocks[::50]
    full = process.memory_info().rss
    blocks.clear()
    if not _C.release_memory():
        pytest.skip("this C library keeps free memory")
    assert process.memory_info().rss < full - 200e6
    assert all((block == 1).all() for block in kept)
