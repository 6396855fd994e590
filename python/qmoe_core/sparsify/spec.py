"""What pruning a stack of matrices takes and gives: shared by the methods (criteria, sparsegpt, alps)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import QmoeError
from ..quantize.base import StackStatistics
from ..quantize.feedback import all_finite
from ..quantize.gptq import PRIOR, lean_on_pooled
from .patterns import Pattern, Sparsity

Option = float | int | str | bool


@dataclass(frozen=True)
class PruneSpec:
    """Which method prunes a weight, to which pattern and sparsity (None where the pattern fixes it), with which of the
    method's options.

    Example:
        >>> from qmoe_core.sparsify import Pattern, PruneSpec
        >>> PruneSpec("alps", Pattern.parse("unstructured"), 0.75, {"iterations": 100}).sparsity
        0.75
    """

    method: str
    pattern: Pattern
    sparsity: Sparsity | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """A pruned stack.

    Attributes:
        weight: (E, N, K) float32, zero where not kept. mask: (E, N, K) bool. notes: per matrix, what was done about
            missing statistics, or "".

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Pattern, PruneSpec, prune_stack
        >>> pruned = prune_stack(torch.tensor([[[3.0, -5.0, 1.0, 4.0]]]), PruneSpec("magnitude", Pattern.parse("2:4")))
        >>> pruned.weight
        tensor([[[ 0., -5.,  0.,  4.]]])
    """

    weight: torch.Tensor
    mask: torch.Tensor
    notes: list[str]

    @classmethod
    def by_mask(cls, weight: torch.Tensor, mask: torch.Tensor, notes: list[str] | None = None) -> Pruned:
        """The kept weights as they are."""
        return cls(weight.masked_fill(~mask, 0.0), mask, notes or [""] * len(weight))


def number(spec: PruneSpec, name: str, default: float, low: float, high: float) -> float:
    """A numeric option within [low, high], or `E_VALUE` naming it."""
    value = spec.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise QmoeError(
            "E_VALUE", f"option '{name}' of method '{spec.method}' is out of range",
            expected=f"{low} to {high}", actual=value,
        )  # fmt: skip
    return float(value)


def moments(statistics: StackStatistics, spec: PruneSpec) -> tuple[torch.Tensor, list[str]]:
    """Second moments per token (E, K, K) float32 and notes: those of matrices that saw few tokens lean on the layer's,
    as in calibrated quantization. Where the whole layer saw none they are the identity: every weight counts alike."""
    shared, notes = lean_on_pooled(statistics, number(spec, "prior", PRIOR, 0.0, 1e6))
    hessian = shared.hessian
    empty = hessian.diagonal(dim1=1, dim2=2).sum(1) == 0
    if bool(empty.any()):
        hessian[empty] = torch.eye(hessian.shape[2], device=hessian.device)
    return hessian, notes


def check_stack(weight: torch.Tensor, statistics: StackStatistics | None, pattern: Pattern) -> None:
    """Raises `E_DTYPE`, `E_SHAPE`, or `E_VALUE` for NaN and infinity."""
    if weight.dtype != torch.float32 or (statistics is not None and statistics.hessian.dtype != torch.float32):
        raise QmoeError("E_DTYPE", "weights and statistics are float32", expected="float32", actual=str(weight.dtype))
    if weight.ndim != 3 or 0 in weight.shape:
        raise QmoeError("E_SHAPE", "weights are a stack (E, N, K)", actual=tuple(weight.shape))
    pattern.check_shape(weight.shape)
    if not all_finite(weight):
        expert, row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise QmoeError("E_VALUE", f"matrix {expert} has a NaN or infinite weight in row {row}, column {column}",
                        actual=float(weight[expert, row, column]))  # fmt: skip
    if statistics is None:
        return
    expected = (weight.shape[0], weight.shape[2], weight.shape[2])
    if tuple(statistics.hessian.shape) != expected:
        raise QmoeError("E_SHAPE", "statistics of another stack", expected=expected,
                        actual=tuple(statistics.hessian.shape))  # fmt: skip
    if not all_finite(statistics.hessian):
        raise QmoeError("E_VALUE", "the calibration statistics have NaN or infinite values")
