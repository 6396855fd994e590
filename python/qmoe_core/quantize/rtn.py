"""Round to nearest: every group of weights gets the uniform grid of its own minimum and maximum.

With a zero point the grid spans [min(w, 0), max(w, 0)], so that 0 is always representable; without, it is symmetric
about zero. With half steps zero lies halfway between two codes: no weight is exactly 0 then, but in groups of nothing
but zeros, whose scale is 0; and without a zero point the steps are wider, since half steps are meant for methods that
choose scales by error. The arithmetic is the C++ core's (`rtn_int`), the same that the benchmark measures.
"""

from __future__ import annotations

import numpy as np
import torch

from .. import _C
from ..formats import IntFormat, IntMatrix
from .base import MethodSpec, TensorReport, check_weight, measure, need_int

OPTIONS: frozenset[str] = frozenset()


def round_to_nearest(weight: np.ndarray, format: IntFormat) -> IntMatrix:
    """A finite float32 (N, K) array on `format`'s grid."""
    codes, scales, zeros = _C.rtn_int(
        weight, format.bits, format.group, format.zero_point, format.scale_dtype, format.half_step
    )
    return IntMatrix(format, codes, scales, zeros)


def quantize(weight: torch.Tensor, spec: MethodSpec) -> tuple[IntMatrix, TensorReport]:
    """Quantizes a float32 (N, K) weight to `spec.format`. Raises `E_VALUE`, `E_DTYPE`, `E_SHAPE`."""
    array = check_weight(weight)
    matrix = round_to_nearest(array, need_int(spec))
    return matrix, measure(array, matrix)
