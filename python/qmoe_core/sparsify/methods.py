"""The one-shot methods; `METHODS` is the only list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import QmoeError
from ..quantize.base import StackStatistics
from . import alps, criteria, sparsegpt
from .spec import Pruned, PruneSpec, check_stack

# weights (E, N, K) float32, statistics, spec, name of the tensor
PruneMethod = Callable[[torch.Tensor, StackStatistics | None, PruneSpec, str], Pruned]


@dataclass(frozen=True)
class PruneInfo:
    """A method, its options, and whether it needs calibration statistics, updates the weights that it keeps, and scores
    weights so that those of different tensors compare (what a global distribution takes)."""

    prune: PruneMethod
    options: frozenset[str]
    needs_statistics: bool
    updates: bool = False
    comparable: bool = False


METHODS: dict[str, PruneInfo] = {
    "magnitude": PruneInfo(criteria.magnitude, criteria.MAGNITUDE_OPTIONS, False, comparable=True),
    "random": PruneInfo(criteria.random, criteria.RANDOM_OPTIONS, False),
    "wanda": PruneInfo(criteria.wanda, criteria.WANDA_OPTIONS, True),
    "sparsegpt": PruneInfo(sparsegpt.prune, sparsegpt.OPTIONS, True, updates=True),
    "alps": PruneInfo(alps.prune, alps.OPTIONS, True, updates=True),
}


def prune_info(method: str, options: object = ()) -> PruneInfo:
    """The method of this name, if it has these options. Raises `E_UNKNOWN`."""
    info = METHODS.get(method)
    if info is None:
        raise QmoeError("E_UNKNOWN", "unknown pruning method", expected=sorted(METHODS), actual=method)
    unknown = sorted(set(options) - info.options)  # type: ignore[call-overload]
    if unknown:
        raise QmoeError("E_UNKNOWN", f"method '{method}' has no option '{unknown[0]}'", expected=sorted(info.options),
                        actual=unknown[0])  # fmt: skip
    return info


@torch.no_grad()
def prune_stack(
    weight: torch.Tensor, spec: PruneSpec, statistics: StackStatistics | None = None, *, tensor: str = ""
) -> Pruned:
    """Prunes a stack of matrices.

    Args:
        weight: (E, N, K) float32, finite.
        statistics: of the matrices' inputs, on the same device; for calibrated methods only.
        tensor: its name, for errors and the random method.

    Raises:
        QmoeError: `E_UNKNOWN` (method, option), `E_VALUE` (NaN or infinite weights or statistics, statistics missing,
            an option or sparsity out of range), `E_SHAPE` (no stack, or not divisible as the pattern needs), `E_DTYPE`.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Pattern, PruneSpec, StackStatistics, prune_stack
        >>> weight, x = torch.randn(1, 4, 8), torch.randn(100, 8)
        >>> statistics = StackStatistics(torch.tensor([100]), (x.T @ x)[None])
        >>> pruned = prune_stack(weight, PruneSpec("sparsegpt", Pattern.parse("2:4")), statistics)
        >>> pruned.mask.sum(2).tolist()
        [[4, 4, 4, 4]]
    """
    info = prune_info(spec.method, spec.options)
    try:
        check_stack(weight, statistics if info.needs_statistics else None, spec.pattern)
        if info.needs_statistics and statistics is None:
            raise QmoeError("E_VALUE", f"method '{spec.method}' needs calibration statistics")
        return info.prune(weight, statistics, spec, tensor)
    except QmoeError as error:
        raise error.locate(tensor=tensor or None) from None
