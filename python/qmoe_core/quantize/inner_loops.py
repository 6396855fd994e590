"""Which kernels take the inner loops of `feedback` and of `grids` off torch's hands."""

from __future__ import annotations

from types import ModuleType

import torch

from . import feedback_cpu, feedback_cuda


def of(tensor: torch.Tensor) -> ModuleType | None:
    """`feedback_cpu` or `feedback_cuda`, by where the tensor is; elsewhere none, and torch does the same, slowly."""
    for loops in (feedback_cpu, feedback_cuda):
        if loops.usable(tensor):
            return loops
    return None
