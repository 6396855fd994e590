"""The ternary code's promise: everything included, at most 5 % over the empirical entropy of the trits."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_core import PackedTensor, TernaryFormat, TernaryMatrix


def bits_over_entropy(rows: int, cols: int, zeros: float, levels: str) -> float:
    """Bits of the whole record per weight, over the entropy of the observed trits, minus 1."""
    rng = np.random.default_rng(rows)
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, cols), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    # bfloat16 levels from 0.8 to 1.25: as much as the largest weights of Gaussian rows differ.
    patterns = rng.integers(0x3F4D, 0x3FA1, (rows, 2 if levels == "pair" else 1)).astype(np.uint32) << 16
    values = patterns.view(np.float32).copy()
    if levels == "pair":
        values[:, 0] *= -1
    packed = PackedTensor.pack([TernaryMatrix(TernaryFormat(levels), trits, values)])
    share = np.array([(trits == t).mean() for t in (-1, 0, 1)])
    return packed.bits_per_weight / float(-(share * np.log2(share)).sum()) - 1


@pytest.mark.parametrize("zeros", [0.60, 0.80, 0.885, 0.95])
@pytest.mark.parametrize(
    ("rows", "cols", "levels"), [(1366, 768, "symmetric"), (512, 2048, "symmetric"), (512, 2048, "pair")]
)
def test_within_five_percent_of_the_entropy(rows: int, cols: int, levels: str, zeros: float) -> None:
    assert 0 < bits_over_entropy(rows, cols, zeros, levels) <= 0.05


@pytest.mark.parametrize("zeros", [0.30, 0.97])
def test_the_range_that_wider_rows_extend(zeros: float) -> None:
    assert 0 < bits_over_entropy(512, 2048, zeros, "symmetric") <= 0.05


def test_what_a_second_level_costs_where_rows_are_shortest() -> None:
    """FORMAT.md admits it: 7.6 % at 768 columns and 0.95 zeros."""
    assert 0.05 < bits_over_entropy(1366, 768, 0.95, "pair") <= 0.08


def test_no_floor() -> None:
    """QMoE's dictionary code cannot go below 0.571 bit a weight, nor a code of one bit per six trits below 0.167."""
    rows, cols = 512, 2048
    trits = np.zeros((rows, cols), np.int8)
    packed = PackedTensor.pack([TernaryMatrix(TernaryFormat("symmetric"), trits, np.ones((rows, 1), np.float32))])
    assert packed.bits_per_weight < 0.005
