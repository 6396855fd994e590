"""Ternary weights {low, 0, high} per row, low <= 0 <= high: two ways to choose the levels and the zeros.

ternary-minmax    QMoE's grid (Frantar & Alistarh, arXiv 2310.16795): low and high are the row's minimum and maximum (0
                  included); w becomes high above high/2, low below low/2, else 0. Very sparse, hence below one bit
                  once entropy coded, but the levels are the row's outliers: rounding to it without calibration costs
                  a lot.
ternary-centroid  Zeros are |w| <= threshold * mean|w| with threshold 0.7 (Li & Liu's ternary weight networks, arXiv
                  1605.04711); the levels are the means of what remains: at equal zeros the least squared error.

Levels are rounded to bfloat16, which is how the format stores them. Means are taken by numpy in float64, whose order of
summation does not depend on the number of threads: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..formats import TernaryFormat, TernaryMatrix
from .base import MethodSpec, TensorReport, check_weight, measure, need_ternary, number_option, row_blocks

MINMAX_OPTIONS: frozenset[str] = frozenset()
CENTROID_OPTIONS = frozenset({"threshold"})


def _bfloat16(levels: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, as float32."""
    return torch.from_numpy(levels.astype(np.float32)).to(torch.bfloat16).to(torch.float32).numpy()


# For one block of rows float32 (n, K): thresholds (below, above) and, once trits are known, levels (low, high), (n,)
# each.
Thresholds = tuple[np.ndarray, np.ndarray]
_Rule = Callable[[np.ndarray], Thresholds]
_Levels = Callable[[np.ndarray, np.ndarray], Thresholds]


def _quantize(
    weight: torch.Tensor, format: TernaryFormat, rule: _Rule, levels_of: _Levels
) -> tuple[TernaryMatrix, TensorReport]:
    """Trits by threshold and their levels, block by block; a symmetric format stores high only."""
    array = check_weight(weight)
    trits = np.empty(array.shape, dtype=np.int8)
    levels = np.empty((array.shape[0], 2), dtype=np.float64)
    for rows in row_blocks(array.shape):
        block = array[rows]
        below, above = rule(block)
        np.subtract(block > above[:, None], block < below[:, None], out=trits[rows], dtype=np.int8, casting="unsafe")
        levels[rows] = np.stack(levels_of(block, trits[rows]), axis=1)
    stored = levels[:, 1:] if format.levels == "symmetric" else levels
    matrix = TernaryMatrix(format, trits, np.ascontiguousarray(_bfloat16(stored)))
    return matrix, measure(array, matrix)


def quantize_minmax(weight: torch.Tensor, spec: MethodSpec) -> tuple[TernaryMatrix, TensorReport]:
    """QMoE's {min, 0, max} grid for a float32 (N, K) weight; symmetric levels use {-max|w|, 0, max|w|}."""
    format = need_ternary(spec)

    def ends(block: np.ndarray) -> Thresholds:
        low, high = np.minimum(block.min(axis=1), 0.0), np.maximum(block.max(axis=1), 0.0)
        if format.levels == "symmetric":
            high = np.maximum(high, -low)
            low = -high
        return low, high

    def halves(block: np.ndarray) -> Thresholds:
        low, high = ends(block)
        return low / 2, high / 2

    return _quantize(weight, format, halves, lambda block, trits: ends(block))


def quantize_centroid(weight: torch.Tensor, spec: MethodSpec) -> tuple[TernaryMatrix, TensorReport]:
    """Threshold and centroids for a float32 (N, K) weight. Option: `threshold` (0.7), in units of the row's mean
    |w|."""
    format = need_ternary(spec)
    threshold = number_option(spec, "threshold", 0.7, 0.0, 10.0)

    def cut(block: np.ndarray) -> Thresholds:
        above = (threshold * np.abs(block).mean(axis=1, dtype=np.float64)).astype(np.float32)
        return -above, above

    def mean_where(block: np.ndarray, mask: np.ndarray) -> np.ndarray:
        total = np.add.reduce(np.where(mask, block, np.float32(0)), axis=1, dtype=np.float64)
        return total / np.maximum(mask.sum(axis=1), 1)

    def centroids(block: np.ndarray, trits: np.ndarray) -> Thresholds:
        if format.levels == "symmetric":
            high = mean_where(np.abs(block), trits != 0)
            return -high, high
        return mean_where(block, trits < 0), mean_where(block, trits > 0)

    return _quantize(weight, format, cut, centroids)
