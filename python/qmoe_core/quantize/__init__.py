"""Quantization methods, one file each; `METHODS` is the only list of them.

Adding one: a file with `OPTIONS` (the option names it takes) and `quantize` (see `base.py`), and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import QmoeError
from ..formats import IntFormat, TernaryFormat
from . import gptq, granularity, moqe, rtn, ternary
from .base import Format, Matrix, Method, MethodSpec, StackMethod, StackStatistics, TensorReport

__all__ = [
    "METHODS",
    "Format",
    "Matrix",
    "MethodInfo",
    "MethodSpec",
    "StackStatistics",
    "TensorReport",
    "default_method",
    "quantize",
    "quantize_stack",
]


@dataclass(frozen=True)
class MethodInfo:
    """A method and what the pipeline must know to offer it: one matrix at a time without statistics (`quantize`), or a
    stack of them with statistics (`quantize_stack`)."""

    format: type[Format] | tuple[type[Format], ...]
    options: frozenset[str]
    quantize: Method | None = None
    quantize_stack: StackMethod | None = None
    experts_only: bool = False
    whole_row: bool = False  # makes only symmetric formats with one scale per row
    weighs_rows: tuple[type[Format], ...] = ()  # formats for which `StackStatistics.row_importance` counts

    @property
    def needs_statistics(self) -> bool:
        return self.quantize_stack is not None


METHODS: dict[str, MethodInfo] = {
    "rtn": MethodInfo(IntFormat, rtn.OPTIONS, rtn.quantize),
    "moqe": MethodInfo(IntFormat, moqe.OPTIONS, moqe.quantize, experts_only=True, whole_row=True),
    "finequant": MethodInfo(IntFormat, granularity.OPTIONS, granularity.quantize),
    "ternary-minmax": MethodInfo(TernaryFormat, ternary.MINMAX_OPTIONS, ternary.quantize_minmax),
    "ternary-centroid": MethodInfo(TernaryFormat, ternary.CENTROID_OPTIONS, ternary.quantize_centroid),
    "gptq": MethodInfo(
        (IntFormat, TernaryFormat), gptq.OPTIONS, quantize_stack=gptq.quantize_stack, weighs_rows=(TernaryFormat,)
    ),
}


def default_method(format: Format) -> str:
    """The method used where a recipe names none."""
    return "rtn" if isinstance(format, IntFormat) else "ternary-centroid"


def _method(spec: MethodSpec, tensor: str | None) -> MethodInfo:
    """The method that `spec` names, its options checked."""
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
    return info


def quantize(weight: torch.Tensor, spec: MethodSpec, *, tensor: str | None = None) -> tuple[Matrix, TensorReport]:
    """Quantizes one float32 (N, K) matrix with the data-free method that `spec` names.

    Raises:
        QmoeError: `E_UNKNOWN` method, `E_VALUE` (NaN or infinite weight, bad option, a method that needs statistics),
            `E_DTYPE`, `E_SHAPE`; with `tensor` filled in.
    """
    info = _method(spec, tensor)
    if info.quantize is None:
        raise QmoeError("E_VALUE", f"method '{spec.method}' needs calibration statistics", tensor=tensor)
    try:
        return info.quantize(weight, spec)
    except QmoeError as error:
        raise error.locate(tensor=tensor) from None


def quantize_stack(
    weights: torch.Tensor, statistics: StackStatistics | None, spec: MethodSpec, *, tensor: str | None = None
) -> list[tuple[Matrix, TensorReport]]:
    """Quantizes float32 weights (E, N, K) with any method: one (matrix, report) for each. Raises as `quantize`."""
    info = _method(spec, tensor)
    if info.quantize_stack is None:
        return [quantize(weight, spec, tensor=tensor and f"{tensor}[{e}]") for e, weight in enumerate(weights)]
    if statistics is None:
        raise QmoeError("E_VALUE", f"method '{spec.method}' needs calibration statistics", tensor=tensor)
    try:
        return info.quantize_stack(weights, statistics, spec)
    except QmoeError as error:
        raise error.locate(tensor=tensor) from None
