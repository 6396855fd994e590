"""MoQE (Kim, Fahim, Hassan Awadalla, arXiv 2310.02410): experts only, symmetric, one scale per output channel.

The paper's point is which matrices to quantize (the experts, and only they: they hold most of the weights and suffer
least), so the arithmetic is plain rounding to nearest; 8, 4 and 3 bits need nothing more, its 2-bit results need
training. The pipeline refuses this method for any tensor that is not an expert.
"""

from __future__ import annotations

import torch

from ..errors import QmoeError
from ..formats import IntMatrix
from .base import MethodSpec, TensorReport, check_weight, measure, need_int
from .rtn import round_to_nearest

OPTIONS: frozenset[str] = frozenset()


def quantize(weight: torch.Tensor, spec: MethodSpec) -> tuple[IntMatrix, TensorReport]:
    """Quantizes a float32 (N, K) weight per row. Raises `E_VALUE` for a format with groups or a zero point."""
    format = need_int(spec)
    if format.group != 0 or format.zero_point:
        raise QmoeError(
            "E_VALUE",
            "moqe is symmetric with one scale per output channel",
            expected="group 0, zero_point false",
            actual=format.name,
        )
    array = check_weight(weight)
    matrix = round_to_nearest(array, format)
    return matrix, measure(array, matrix)
