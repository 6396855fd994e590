"""Which experts a model's routers choose, observed with forward hooks and no knowledge of the model family.

A router is any module whose class name contains "router" or ends in "gate", that holds no other router, and whose
forward returns a tuple with an integer tensor: what transformers 5 has (`*TopKRouter` and `*TopkRouter` return the
chosen ids as (T, k); the Switch Transformers router returns a 0/1 dispatch mask (..., E)). Modules of such a name that
return no integer tensor are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    named = [
        (name, module)
        for name, module in model.named_modules()
        if "router" in type(module).__name__.lower() or type(module).__name__.lower().endswith("gate")
    ]
    return [(n, m) for n, m in named if not any(other.startswith(f"{n}.") for other, _ in named)]


def selection_mask(router: nn.Module, output: Any) -> torch.Tensor | None:
    """The experts chosen per token as a (T, E) bool tensor, from what a router's forward returned.

    The last integer tensor of the output counts. Its last dimension is the number of experts (then it is a dispatch
    mask: nonzero means chosen) or the number of choices (then it holds ids; ids >= E, the marker of other
    expert-parallel ranks, are dropped).

    Returns None where there is no integer tensor or the number of experts cannot be found.
    """
    tensors = [t for t in output if isinstance(t, torch.Tensor)] if isinstance(output, (tuple, list)) else []
    integer = [t for t in tensors if t.dtype in (torch.int64, torch.int32) and t.dim() >= 2]
    if not integer:
        return None
    chosen = integer[-1].reshape(-1, integer[-1].shape[-1])
    experts = getattr(router, "num_experts", None)
    if experts is None:
        # Without the attribute, the widest floating output is the logits or probabilities over all experts.
        experts = max((t.shape[-1] for t in tensors if t.is_floating_point()), default=0)
    if not experts:
        return None
    if chosen.shape[-1] == experts and getattr(router, "top_k", None) != experts:
        return chosen != 0
    mask = torch.zeros(chosen.shape[0], experts + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, chosen.long().clamp(0, experts), True)[:, :experts]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect every router's choices while the block runs.

    Yields a dict from router name to the list of (T, E) bool masks of its calls, filled during forward passes. The
    caller empties it.
    """
    selections: dict[str, list[torch.Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            mask = selection_mask(module, output)
            if mask is not None:
                selections.setdefault(name, []).append(mask)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in _candidates(model)]
    try:
        yield selections
    finally:
        for handle in handles:
            handle.remove()


def agreement(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Per token, the share of experts that both chose: |A and B| / max(|A|, |B|), and 1 where both are empty.

    Two (T, E) bool masks -> (T,) float64.
    """
    common = (reference & other).sum(-1).double()
    size = torch.maximum(reference.sum(-1), other.sum(-1)).double()
    return torch.where(size > 0, common / size.clamp(min=1), torch.ones_like(common))
