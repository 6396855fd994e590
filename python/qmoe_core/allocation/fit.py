"""From measured candidates and a budget to a recipe."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QmoeError
from ..families import analyze
from ..recipe import Recipe, Rule
from ..source import SourceCheckpoint
from .budget import directory_overhead, source_bytes
from .problem import Candidate, Item, Tables
from .solver import Allocation, hull_steps, solve

MAX_POINTS = 64


@dataclass(frozen=True)
class FrontierPoint:
    """The least total loss that `nbytes` of records can have."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class FitPlan:
    """A recipe for a budget, and what is known about it.

    Attributes:
        recipe: what to compress with. budget: bytes of the whole directory; `overhead`: of everything but the records.
        allocation: the choice, its predicted loss and how far the best choice can be from it. items: what it was
            chosen from. frontier: the least loss for other sizes of the records.
        basis: what the losses are: "streamed" (nats per token of KL divergence, predicted while the model streamed by),
            "weights" (mean relative error energy of the weights), or "" where the items came from elsewhere.
    """

    recipe: Recipe
    budget: int
    overhead: int
    allocation: Allocation
    items: tuple[Item, ...]
    frontier: tuple[FrontierPoint, ...]
    basis: str = ""

    @property
    def predicted_bytes(self) -> int:
        """Predicted size of the directory."""
        return self.overhead + self.allocation.nbytes

    def summary(self) -> dict[str, Any]:
        """What qmoe.json and the report say: plain JSON types, losses to 7 digits. `counts`: how many tensors of each
        role get each format; `frontier`: bytes of the whole directory and the least loss."""
        counts: dict[str, dict[str, int]] = {}
        for item, number in zip(self.items, self.allocation.choice, strict=True):
            of_role = counts.setdefault(item.role, {})
            name = short_name(item.candidates[number].settings)
            of_role[name] = of_role.get(name, 0) + 1
        certificate = self.allocation.to_dict()
        return {
            "budget": self.budget,
            "basis": self.basis,
            "overhead": self.overhead,
            "predicted_bytes": self.predicted_bytes,
            "allocation": {name: _digits(value) for name, value in certificate.items()},
            "counts": counts,
            "frontier": [[self.overhead + point.nbytes, _digits(point.loss)] for point in self.frontier],
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and the choice by tensor, as plain JSON types."""
        chosen = zip(self.items, self.allocation.choice, strict=True)
        choice = {item.name: dict(item.candidates[number].settings) for item, number in chosen}
        return {**self.summary(), "choice": choice}


def short_name(settings: Mapping[str, Any]) -> str:
    """What a candidate is called in tables: its format's name and the method's options."""
    spec = Rule.make(**settings).spec
    if spec is None:
        return "kept"
    return " ".join([spec.format.name, *(f"{key} {value}" for key, value in spec.options.items())])


def _digits(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def plan_recipe(items: Sequence[Item], allocation: Allocation) -> Recipe:
    """The recipe of an allocation: per role the most frequent settings for everything, before it one rule for every
    tensor that differs. The items must be all targets of their roles."""
    key = [_key(item.candidates[number].settings) for item, number in zip(items, allocation.choice, strict=True)]
    special, general = [], []
    for role in dict.fromkeys(item.role for item in items):
        of_role = [(item, settings) for item, settings in zip(items, key, strict=True) if item.role == role]
        usual = Counter(settings for _, settings in of_role).most_common(1)[0][0]
        for item, settings in of_role:
            if settings != usual:
                special.append(Rule.make(**json.loads(settings), match=glob.escape(item.name), role=role))
        general.append(Rule.make(**json.loads(usual), role=role))
    return Recipe((*special, *general))


def _key(settings: Any) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def frontier(items: Sequence[Item], max_points: int = MAX_POINTS) -> tuple[FrontierPoint, ...]:
    """Bytes and least loss from the smallest choice to the best one. Every point is a real choice of whole candidates
    on the convex hull of all choices: none of its size or smaller has less loss. Where there are more than
    `max_points`, evenly spaced ones of them."""
    tables = Tables.of(items)
    steps = hull_steps(tables)
    rows = np.arange(len(tables.nbytes))
    nbytes = int(tables.nbytes[rows, steps.start].sum()) + np.concatenate([[0], np.cumsum(steps.nbytes)])
    loss = float(tables.loss[rows, steps.start].sum()) - np.concatenate([[0.0], np.cumsum(steps.gain)])
    places = np.unique(np.linspace(0, len(nbytes) - 1, min(max_points, len(nbytes))).round().astype(int))
    return tuple(FrontierPoint(int(nbytes[place]), float(loss[place])) for place in places)


def plan_fit(
    source: str | os.PathLike[str],
    budget: int,
    items: Sequence[Item],
    *,
    max_shard_bytes: int = 5 * 10**9,
    calibrated: bool = False,
    basis: str = "",
) -> FitPlan:
    """The recipe of least predicted loss whose directory takes `budget` bytes at most.

    Args:
        source: the checkpoint. budget: bytes of the whole output directory.
        items: all targets of the roles to compress, as `measure_streamed` or `weight_errors` gives them.
        calibrated: whether the compression will be calibrated (its qmoe.json says more).
        basis: as in `FitPlan`.

    Raises:
        QmoeError: `E_VALUE` where the budget is below the smallest possible directory, naming that size.
    """
    source = Path(source)
    with SourceCheckpoint(source) as checkpoint:
        layout = analyze(source, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        names = {item.name for item in items}
        targets = [target for target in layout.targets if target.name in names]
        if len(targets) != len(items):
            missing = sorted(names - {target.name for target in targets})
            raise QmoeError("E_VALUE", "allocation: items that are no weights of this model", actual=missing[:5])
        by_name = {target.name: target for target in targets}
        items = [_kept_exactly(item, source_bytes(checkpoint, by_name[item.name])) for item in items]
        overhead = directory_overhead(
            checkpoint, layout, targets, max_shard_bytes=max_shard_bytes, calibrated=calibrated
        )
    smallest = overhead + sum(min(candidate.nbytes for candidate in item.candidates) for item in items)
    if smallest > budget:
        raise QmoeError(
            "E_VALUE", "the budget is below the smallest size that these formats can make of this model",
            file=source, expected=f">= {smallest} bytes", actual=budget,
        )  # fmt: skip
    allocation = solve(items, budget - overhead)
    recipe = plan_recipe(items, allocation)
    return FitPlan(recipe, budget, overhead, allocation, tuple(items), frontier(items), basis)


def _kept_exactly(item: Item, nbytes: int) -> Item:
    """The item with `nbytes` as the size of its candidates that keep the tensor as it is."""
    candidates = (
        Candidate(nbytes, entry.loss, entry.settings) if entry.settings.get("format") == "keep" else entry
        for entry in item.candidates
    )
    return Item(item.name, item.weights, tuple(candidates), item.role)
