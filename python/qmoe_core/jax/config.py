"""Algorithms by name, and from configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import optax

from ..errors import QmoeError
from .distributions import erk, uniform
from .extensions import ACDC, AdamBasedFisherPruning, IterativeNMPruning, WandaPruning
from .pruners import (
    GlobalMagnitudePruning,
    GlobalSaliencyPruning,
    MagnitudePruning,
    RandomPruning,
    SaliencyPruning,
    SteMagnitudePruning,
    SteRandomPruning,
    _Global,
)
from .schedules import NoUpdateSchedule, OneShotSchedule, PolynomialSchedule
from .trainers import SET, RigL, StaticRandomSparse
from .types import parse_type
from .updater import BaseUpdater, NoPruning

ALGORITHM_REGISTRY: dict[str, Callable[..., BaseUpdater]] = {
    "no_prune": NoPruning,
    "magnitude": MagnitudePruning,
    "random": RandomPruning,
    "saliency": SaliencyPruning,
    "magnitude_ste": SteMagnitudePruning,
    "random_ste": SteRandomPruning,
    "global_magnitude": GlobalMagnitudePruning,
    "global_saliency": GlobalSaliencyPruning,
    "static_sparse": StaticRandomSparse,
    "rigl": RigL,
    "set": SET,
    "acdc": ACDC,
    "adam-fisher": AdamBasedFisherPruning,
    "iterative_nm": IterativeNMPruning,
    "wanda": WandaPruning,
}
_DISTRIBUTIONS = {"uniform": uniform, "erk": erk}


def all_algorithm_names() -> tuple[str, ...]:
    """What `create_updater_from_config` knows."""
    return tuple(ALGORITHM_REGISTRY)


def register_algorithm(algorithm_name: str, algorithm: Callable[..., BaseUpdater]) -> None:
    """Makes a subclass of `BaseUpdater` known by a name, or replaces one."""
    ALGORITHM_REGISTRY[algorithm_name] = algorithm


def create_updater_from_config(sparsity_config: Any) -> BaseUpdater:
    """The updater that a configuration describes.

    Args:
        sparsity_config: a mapping, or an `ml_collections.ConfigDict`; it is only read. `None` values count as absent.
            algorithm: one of `all_algorithm_names()`.
            sparsity: of all that is pruned. Needed, but for "no_prune".
            dist_type: "uniform" or "erk"; needed but for global algorithms and "no_prune".
            filter_fn, custom_sparsity_map: see `uniform`.
            sparsity_type: a type, or a text for `parse_type`.
            update_start_step, update_end_step, update_freq: without the first, masks never change; where the first two
                are equal they change once; else they follow `PolynomialSchedule`.
            drop_fraction: of "rigl" and "set", 0.1, falling to 0 at update_end_step as a cosine.
            Everything else is an argument of the algorithm.

    Raises:
        QmoeError: `E_UNKNOWN` (algorithm, distribution, type, argument), `E_MISSING`, `E_VALUE`.

    Example:
        >>> from qmoe_core.jax import create_updater_from_config
        >>> updater = create_updater_from_config({
        ...     "algorithm": "magnitude", "dist_type": "erk", "sparsity": 0.8, "sparsity_type": "nm_1,4",
        ...     "update_freq": 10, "update_start_step": 200, "update_end_step": 1000,
        ... })
        >>> updater.scheduler.update_end_step, updater.sparsity_type
        (1000, NByM(n=1, m=4, axis=-1))
    """
    given = {name: value for name, value in dict(sparsity_config.items()).items() if value is not None}
    name = _take(given, "algorithm")
    if name not in ALGORITHM_REGISTRY:
        raise QmoeError("E_UNKNOWN", "unknown algorithm; register_algorithm adds one", expected=all_algorithm_names(),
                        actual=name)  # fmt: skip
    if name == "no_prune":
        return NoPruning()
    make = ALGORITHM_REGISTRY[name]
    is_global = name.startswith("global_") or (isinstance(make, type) and issubclass(make, _Global))
    if isinstance(given.get("custom_sparsity_map"), Mapping) or hasattr(given.get("custom_sparsity_map"), "items"):
        given["custom_sparsity_map"] = dict(given["custom_sparsity_map"].items())
    if is_global:
        given.pop("dist_type", None)
    else:
        given["sparsity_distribution_fn"] = _distribution(given)
    if isinstance(given.get("sparsity_type"), str):
        given["sparsity_type"] = parse_type(given["sparsity_type"])
    drop_fraction = given.pop("drop_fraction", 0.1)
    if name in ("rigl", "set") and "drop_fraction_fn" not in given:
        if "update_end_step" not in given:
            raise QmoeError("E_MISSING", f"{name} needs update_end_step", tensor="update_end_step")
        given["drop_fraction_fn"] = optax.cosine_decay_schedule(drop_fraction, given["update_end_step"])
    schedule = _schedule(given)
    if name != "acdc":  # it has its own
        given["scheduler"] = schedule
    if isinstance(make, type) and issubclass(make, BaseUpdater):
        unknown = set(given) - {entry.name for entry in fields(make)}
        if unknown:
            raise QmoeError("E_UNKNOWN", f"{name} has no argument {', '.join(sorted(unknown))}")
    return make(**given)


def _distribution(given: dict[str, Any]) -> Callable[[Any], Any]:
    """Takes dist_type, sparsity, filter_fn and custom_sparsity_map out of `given`."""
    kind = _take(given, "dist_type")
    if kind not in _DISTRIBUTIONS:
        raise QmoeError("E_UNKNOWN", "unknown dist_type", expected="uniform or erk", actual=kind)
    settings: dict[str, Any] = {"sparsity": _take(given, "sparsity")}
    settings |= {name: given.pop(name) for name in ("filter_fn", "custom_sparsity_map") if name in given}
    return partial(_DISTRIBUTIONS[kind], **settings)


def _schedule(given: dict[str, Any]) -> NoUpdateSchedule:
    """Takes the update_ fields out of `given`."""
    start, end = given.pop("update_start_step", None), given.pop("update_end_step", None)
    freq = given.pop("update_freq", None)
    if start is None:
        return NoUpdateSchedule()
    if end is None:
        raise QmoeError("E_MISSING", "update_start_step needs update_end_step", tensor="update_end_step")
    if start == end:
        return OneShotSchedule(target_step=end)
    if freq is None:
        raise QmoeError("E_MISSING", "a schedule of several updates needs update_freq", tensor="update_freq")
    return PolynomialSchedule(update_freq=freq, update_start_step=start, update_end_step=end)


def _take(given: dict[str, Any], name: str) -> Any:
    if name not in given:
        raise QmoeError("E_MISSING", f"the configuration has no {name}", tensor=name)
    return given.pop(name)
