"""Sparsity: which weights to drop, and what is left of a model without them. Everything makes or takes `Masks`.

patterns      which weights may be zero together: 2:4, 16:32, blocks, channels, any
distribution  how the zeros are spread over tensors
masks         masks by tensor name: apply, report, save, load
methods       one-shot pruning of matrices: magnitude, random, Wanda, SparseGPT, ALPS
pruning, job  the same for models in memory and for checkpoints, layer by layer
expert_job    whole experts taken out, by what they do on calibration text
scaling       what loss a sparsity, a size and an amount of data lead to

Names are imported when they are used: scaling laws need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..quantize.base import StackStatistics
    from .distribution import distribute
    from .expert_job import ExpertReport, prune_experts
    from .job import prune_checkpoint
    from .maskfile import MaskFile
    from .masks import MaskEntry, Masks
    from .methods import prune_stack
    from .patterns import NM, Block, Channel, Pattern, Sparsity, Unstructured
    from .pruning import prune
    from .report import PruneReport, PruneSettings, load_prune_report
    from .scaling import ScalingFit, ScalingLaw
    from .spec import Pruned, PruneSpec

# By the module that defines them.
_LAZY = {
    "NM": "patterns",
    "Block": "patterns",
    "Channel": "patterns",
    "ExpertReport": "expert_job",
    "MaskEntry": "masks",
    "MaskFile": "maskfile",
    "Masks": "masks",
    "Pattern": "patterns",
    "PruneReport": "report",
    "PruneSettings": "report",
    "PruneSpec": "spec",
    "Pruned": "spec",
    "ScalingFit": "scaling",
    "ScalingLaw": "scaling",
    "Sparsity": "patterns",
    "StackStatistics": "..quantize.base",
    "Unstructured": "patterns",
    "distribute": "distribution",
    "load_prune_report": "report",
    "prune": "pruning",
    "prune_checkpoint": "job",
    "prune_experts": "expert_job",
    "prune_stack": "methods",
}

__all__ = [
    "NM",
    "Block",
    "Channel",
    "ExpertReport",
    "MaskEntry",
    "MaskFile",
    "Masks",
    "Pattern",
    "PruneReport",
    "PruneSettings",
    "PruneSpec",
    "Pruned",
    "ScalingFit",
    "ScalingLaw",
    "Sparsity",
    "StackStatistics",
    "Unstructured",
    "distribute",
    "load_prune_report",
    "prune",
    "prune_checkpoint",
    "prune_experts",
    "prune_stack",
]


if not TYPE_CHECKING:  # a type checker would believe every name of it

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            module = _LAZY[name]
            return getattr(importlib.import_module(module if module[0] == "." else f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
