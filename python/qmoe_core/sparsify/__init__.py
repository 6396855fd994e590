"""Sparsity: which weights to drop, and what is left of a model without them. Everything makes or takes `Masks`.

patterns      which weights may be zero together: 2:4, 16:32, blocks, channels, any
distribution  how the zeros are spread over tensors
masks         masks by tensor name: apply, report, save, load
methods       one-shot pruning of matrices: magnitude, random, Wanda, SparseGPT, ALPS
pruning, job  the same for models in memory and for checkpoints, layer by layer
expert_job    whole experts taken out, by what they do on calibration text
training      masks that change by a schedule while an optimizer trains the weights
maskllm       masks that are learned while the weights stay
distillation  losses against a dense teacher
scaling       what loss a sparsity, a size and an amount of data lead to

Names are imported when they are used: scaling laws need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..quantize.base import StackStatistics
    from .distillation import Distiller
    from .distribution import distribute
    from .expert_job import ExpertReport, prune_experts
    from .job import prune_checkpoint
    from .maskfile import MaskFile
    from .maskllm import MaskLearner
    from .masks import MaskEntry, Masks
    from .methods import prune_stack
    from .patterns import NM, Block, Channel, Pattern, Sparsity, Unstructured
    from .pruning import prune
    from .report import PruneReport, PruneSettings, load_prune_report
    from .scaling import ScalingFit, ScalingLaw
    from .schedules import ACDC, Constant, Cubic, OneShot, Periodic, Schedule
    from .spec import Pruned, PruneSpec
    from .training import Sparsifier

# By the module that defines them.
_LAZY = {
    "ACDC": "schedules",
    "Block": "patterns",
    "Channel": "patterns",
    "Constant": "schedules",
    "Cubic": "schedules",
    "Distiller": "distillation",
    "ExpertReport": "expert_job",
    "MaskEntry": "masks",
    "MaskFile": "maskfile",
    "MaskLearner": "maskllm",
    "Masks": "masks",
    "NM": "patterns",
    "OneShot": "schedules",
    "Pattern": "patterns",
    "Periodic": "schedules",
    "PruneReport": "report",
    "PruneSettings": "report",
    "PruneSpec": "spec",
    "Pruned": "spec",
    "ScalingFit": "scaling",
    "ScalingLaw": "scaling",
    "Schedule": "schedules",
    "Sparsifier": "training",
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
    "ACDC",
    "NM",
    "Block",
    "Channel",
    "Constant",
    "Cubic",
    "Distiller",
    "ExpertReport",
    "MaskEntry",
    "MaskFile",
    "MaskLearner",
    "Masks",
    "OneShot",
    "Pattern",
    "Periodic",
    "PruneReport",
    "PruneSettings",
    "PruneSpec",
    "Pruned",
    "ScalingFit",
    "ScalingLaw",
    "Schedule",
    "Sparsifier",
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
