"""Sparsity: which weights to drop, and what is left of a model without them. Everything makes or takes `Masks`.

patterns      which weights may be zero together: 2:4, 16:32, blocks, channels, any
distribution  how the zeros are spread over tensors
masks         masks by tensor name: apply, report, save, load
scaling       what loss a sparsity, a size and an amount of data lead to

Names are imported when they are used: scaling laws need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distribution import distribute
    from .maskfile import MaskFile
    from .masks import MaskEntry, Masks
    from .patterns import NM, Block, Channel, Pattern, Sparsity, Unstructured
    from .scaling import ScalingFit, ScalingLaw

# By the module that defines them.
_LAZY = {
    "NM": "patterns",
    "Block": "patterns",
    "Channel": "patterns",
    "MaskEntry": "masks",
    "MaskFile": "maskfile",
    "Masks": "masks",
    "Pattern": "patterns",
    "ScalingFit": "scaling",
    "ScalingLaw": "scaling",
    "Sparsity": "patterns",
    "Unstructured": "patterns",
    "distribute": "distribution",
}

__all__ = [
    "NM",
    "Block",
    "Channel",
    "MaskEntry",
    "MaskFile",
    "Masks",
    "Pattern",
    "ScalingFit",
    "ScalingLaw",
    "Sparsity",
    "Unstructured",
    "distribute",
]


if not TYPE_CHECKING:  # a type checker would believe every name of it

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
