"""Quantization methods, one file each; `METHODS` is the only list of them.

Adding one: a file with `OPTIONS` (the option names it takes) and `quantize` (see `base.py`), and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import QmoeError
from ..formats import IntFormat, TernaryFormat
from . import granularity, moqe, rtn, ternary
from .base import Format, Matrix, Method, MethodSpec, Statistics, TensorReport

__all__ = [
    "METHODS",
    "Format",
    "Matrix",
    "MethodInfo",
    "MethodSpec",
    "Statistics",
    "TensorReport",
    "default_method",
    "quantize",
]


@dataclass(frozen=True)
class MethodInfo:
    """A method and what the pipeline must know to offer it."""

    quantize: Method
    format: type[IntFormat] | type[TernaryFormat]
    options: frozenset[str]
    needs_statistics: bool = False
    experts_only: bool = False
    whole_row: bool = False  # makes only symmetric formats with one scale per row


METHODS: dict[str, MethodInfo] = {
    "rtn": MethodInfo(rtn.quantize, IntFormat, rtn.OPTIONS),
    "moqe": MethodInfo(moqe.quantize, IntFormat, moqe.OPTIONS, experts_only=True, whole_row=True),
    "finequant": MethodInfo(granularity.quantize, IntFormat, granularity.OPTIONS),
    "ternary-minmax": MethodInfo(ternary.quantize_minmax, TernaryFormat, ternary.MINMAX_OPTIONS),
    "ternary-centroid": MethodInfo(ternary.quantize_centroid, TernaryFormat, ternary.CENTROID_OPTIONS),
}


def default_method(format: Format) -> str:
    """The method used where a recipe names none."""
    return "rtn" if isinstance(format, IntFormat) else "ternary-centroid"


def quantize(
    weight: torch.Tensor, statistics: Statistics | None, spec: MethodSpec, *, tensor: str | None = None
) -> tuple[Matrix, TensorReport]:
    """Quantizes one float32 (N, K) matrix with the method that `spec` names.

    Raises:
        QmoeError: `E_UNKNOWN` method, `E_VALUE` (NaN or infinite weight, bad option, missing statistics), `E_DTYPE`,
            `E_SHAPE`; with `tensor` filled in.
    """
    info = METHODS.get(spec.method)
    if info is None:
        raise QmoeError(
            "E_UNKNOWN", "unknown quantization method", tensor=tensor, expected=sorted(METHODS), actual=spec.method
        )
    unknown = sorted(set(spec.options) - info.options)
    if unknown:
        raise QmoeError(
            "E_UNKNOWN",
            f"method '{spec.method}' has no option '{unknown[0]}'",
            tensor=tensor,
            expected=sorted(info.options),
            actual=unknown[0],
        )
    if info.needs_statistics and statistics is None:
        raise QmoeError("E_VALUE", f"method '{spec.method}' needs calibration statistics", tensor=tensor)
    try:
        return info.quantize(weight, statistics, spec)
    except QmoeError as error:
        raise error.locate(tensor=tensor) from None
