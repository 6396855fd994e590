"""Pruning and sparse training for JAX, with any optax optimizer: JaxPruner's algorithms, names and masks.

    pruner = create_updater_from_config({"algorithm": "magnitude", "dist_type": "erk", "sparsity": 0.8, ...})
    optimizer = pruner.wrap_optax(optax.adamw(1e-3))
    ...
    params = pruner.post_gradient_update(optax.apply_updates(params, updates), state)

Needs jax and optax (`pip install "qmoe-core[jax]"`), and no torch. What differs from JaxPruner: docs/jax.md.
"""

from __future__ import annotations

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"qmoe_core.jax needs {error.name}: pip install 'qmoe-core[jax]'", name=error.name
    ) from error

from .config import ALGORITHM_REGISTRY, all_algorithm_names, create_updater_from_config, register_algorithm
from .distributions import erk, kernels_only, not_dim_one, uniform
from .exchange import load_masks, save_masks
from .extensions import (
    ACDC,
    ACDCSchedule,
    AdamBasedFisherPruning,
    IterativeNMPruning,
    WandaPruning,
    dense_input_norms,
)
from .masks import apply_mask, get_topk_fn, pack_masks, unpack_masks
from .pruners import (
    GlobalMagnitudePruning,
    GlobalSaliencyPruning,
    MagnitudePruning,
    RandomPruning,
    SaliencyPruning,
    SteMagnitudePruning,
    SteRandomPruning,
)
from .schedules import NoUpdateSchedule, OneShotSchedule, PeriodicSchedule, PolynomialSchedule
from .state import SparseState
from .summary import summarize_intersection, summarize_sparsity
from .trainers import SET, RigL, StaticRandomSparse
from .types import Block, Channel, NByM, SparsityType, Unstructured, parse_type
from .updater import BaseUpdater, NoPruning

__all__ = [
    "ACDC",
    "ALGORITHM_REGISTRY",
    "SET",
    "ACDCSchedule",
    "AdamBasedFisherPruning",
    "BaseUpdater",
    "Block",
    "Channel",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "IterativeNMPruning",
    "MagnitudePruning",
    "NByM",
    "NoPruning",
    "NoUpdateSchedule",
    "OneShotSchedule",
    "PeriodicSchedule",
    "PolynomialSchedule",
    "RandomPruning",
    "RigL",
    "SaliencyPruning",
    "SparseState",
    "SparsityType",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "Unstructured",
    "WandaPruning",
    "all_algorithm_names",
    "apply_mask",
    "create_updater_from_config",
    "dense_input_norms",
    "erk",
    "get_topk_fn",
    "kernels_only",
    "load_masks",
    "not_dim_one",
    "pack_masks",
    "parse_type",
    "register_algorithm",
    "save_masks",
    "summarize_intersection",
    "summarize_sparsity",
    "uniform",
    "unpack_masks",
]
