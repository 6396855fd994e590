"""What an experts module does between its two projections, in the terms of the fused kernels.

Families write their gating in Python (`_apply_gate`), in halves or interleaved, clamped or not. Instead of keeping a
list of classes, a module is tried on a few numbers: the first known gating that gives the same results is what it does.
One that none of them matches runs unfused, through its own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class Gating:
    """One activation between the projections.

    Attributes:
        order: how rows of gate and up lie in the first projection; "plain" without a gate.
        activation: name of the function; of the gate's part where there is one.
        clamped: (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within +-limit (gpt-oss).
    """

    order: str
    activation: str = "silu"
    clamped: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, 2 I) -> (T, I), or (T, I) -> (T, I) without a gate."""
        if self.order == "plain":
            return ACTIVATIONS[self.activation](x)
        gate, up = x.chunk(2, -1) if self.order == "halves" else (x[..., ::2], x[..., 1::2])
        if self.clamped:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        return ACTIVATIONS[self.activation](gate) * up


def recognize(module: Any) -> Gating | None:
    """The gating of an experts module of transformers, or None where no kernel has it."""
    candidates = [Gating("plain" if not module.has_gate else order, name) for order in ("halves", "interleaved")
                  for name in ACTIVATIONS]  # fmt: skip
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if module.has_gate and isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        candidates += [Gating(order, "silu", True, float(alpha), float(limit)) for order in ("halves", "interleaved")]
    # Far enough out to meet limits, from a generator of its own: the caller's random numbers are not touched.
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        probe = torch.randn(16, 32, generator=generator) * 6
        try:
            expected = type(module)._apply_gate(module, probe) if module.has_gate else module.act_fn(probe)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # wants another shape, or weights that are not here
            return None
        for gating in candidates:
            value = gating(probe)
            if value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-5, atol=1e-6):
                return gating
    return None
