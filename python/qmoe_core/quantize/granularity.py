"""Adaptive granularity in the spirit of FineQuant (Kim, Henry, Fahim, Hassan Awadalla, arXiv 2308.09723).

FineQuant chooses a group size for each matrix by looking at the weights alone, starting with whole rows and halving
while that helps. Its exact rule is not published in a form that could be checked, so this is OUR rule:

    Quantize with the finest allowed group size; call its relative error e. Try whole rows, then 128, 64, 32, and take
    the first (coarsest) whose relative error is at most `max_error_ratio` * e.

Why a ratio to the finest and not between neighbours: an error that grows a little at each of several steps would pass
every neighbour test and still end far from the best. For Gaussian rows of 256 the ratios to group 32 are about 1.36
(whole row), 1.25 (128) and 1.13 (64), so the default of 1.25 spends scales only where a matrix has outliers that
spoil their whole row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..formats import IntMatrix
from .base import MethodSpec, TensorReport, check_weight, measure, need_int, number_option
from .rtn import round_to_nearest

OPTIONS = frozenset({"max_error_ratio", "min_group"})
GROUPS = (128, 64, 32)


def quantize(weight: torch.Tensor, spec: MethodSpec) -> tuple[IntMatrix, TensorReport]:
    """Quantizes a float32 (N, K) weight to `spec.format` with the group size chosen by the rule above (the format's
    own group is not used). Options: `max_error_ratio` (1.25), `min_group` (32). Raises `E_VALUE`, `E_DTYPE`,
    `E_SHAPE`."""
    format = need_int(spec)
    ratio = number_option(spec, "max_error_ratio", 1.25, 1.0, 1e6)
    min_group = number_option(spec, "min_group", 32, 32, 128)
    array = check_weight(weight)
    groups = [0, *(group for group in GROUPS if min_group <= group < array.shape[1])]

    def attempt(group: int) -> tuple[IntMatrix, TensorReport]:
        matrix = round_to_nearest(array, replace(format, group=group))
        return matrix, measure(array, matrix)

    finest = attempt(groups[-1])
    for group in groups[:-1]:
        candidate = attempt(group)
        if candidate[1].relative_error <= ratio * finest[1].relative_error:
            return candidate
    return finest
