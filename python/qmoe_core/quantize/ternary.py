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

import numpy as np
import torch

from ..formats import TernaryFormat, TernaryMatrix
from .base import MethodSpec, Statistics, TensorReport, check_weight, measure, need_ternary, number_option

MINMAX_OPTIONS: frozenset[str] = frozenset()
CENTROID_OPTIONS = frozenset({"threshold"})


def _bfloat16(levels: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, as float32."""
    return torch.from_numpy(levels.astype(np.float32)).to(torch.bfloat16).to(torch.float32).numpy()


def _matrix(format: TernaryFormat, trits: np.ndarray, low: np.ndarray, high: np.ndarray) -> TernaryMatrix:
    """trits int8 (N, K); low <= 0 and high >= 0, (N,). A symmetric format gets high only."""
    levels = high[:, None] if format.levels == "symmetric" else np.stack([low, high], axis=1)
    return TernaryMatrix(format, trits, np.ascontiguousarray(_bfloat16(levels)))


def _trits(weight: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """int8 (N, K): 1 where w > above, -1 where w < below, thresholds (N,)."""
    return (weight > above[:, None]).astype(np.int8) - (weight < below[:, None]).astype(np.int8)


def quantize_minmax(
    weight: torch.Tensor, statistics: Statistics | None, spec: MethodSpec
) -> tuple[TernaryMatrix, TensorReport]:
    """QMoE's {min, 0, max} grid for a float32 (N, K) weight; symmetric levels use {-max|w|, 0, max|w|}."""
    format = need_ternary(spec)
    array = check_weight(weight)
    low, high = np.minimum(array.min(axis=1), 0.0), np.maximum(array.max(axis=1), 0.0)
    if format.levels == "symmetric":
        high = np.maximum(high, -low)
        low = -high
    matrix = _matrix(format, _trits(array, low / 2, high / 2), low, high)
    return matrix, measure(array, matrix)


def quantize_centroid(
    weight: torch.Tensor, statistics: Statistics | None, spec: MethodSpec
) -> tuple[TernaryMatrix, TensorReport]:
    """Threshold and centroids for a float32 (N, K) weight. Option: `threshold` (0.7), in units of the row's mean
    |w|."""
    format = need_ternary(spec)
    threshold = number_option(spec, "threshold", 0.7, 0.0, 10.0)
    array = check_weight(weight)
    cut = (threshold * np.abs(array).mean(axis=1, dtype=np.float64)).astype(np.float32)
    trits = _trits(array, -cut, cut)

    def mean_where(mask: np.ndarray) -> np.ndarray:
        total = np.add.reduce(np.where(mask, array, np.float32(0)), axis=1, dtype=np.float64)
        return total / np.maximum(mask.sum(axis=1), 1)

    if format.levels == "symmetric":
        signed = np.where(trits < 0, -array, array)
        high = np.add.reduce(np.where(trits != 0, signed, np.float32(0)), axis=1, dtype=np.float64)
        high /= np.maximum((trits != 0).sum(axis=1), 1)
        low = -high
    else:
        low, high = mean_where(trits < 0), mean_where(trits > 0)
    matrix = _matrix(format, trits, low, high)
    return matrix, measure(array, matrix)
