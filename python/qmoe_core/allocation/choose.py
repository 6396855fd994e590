"""A budget in place of a recipe: what `qmoe compress --fit` and `--bits` do before they compress.

The losses that a plan is made from, and the plan, are in the journal of the output: a killed compression goes on with
them. Losses do not depend on the budget, so another budget for an output that was planned but not begun takes them up
too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..calibration import CalibrationSpec
from ..calibration.distributed import Group
from ..calibration.job import load_calibration
from ..errors import QmoeError
from ..families import ModelLayout, Target
from ..journal import DIRECTORY, Journal, check_same_job
from ..recipe import Recipe
from ..roles import COMPRESSIBLE
from ..source import SourceCheckpoint
from ..store import io_errors
from .budget import bytes_for_bits, parse_bytes
from .fit import plan_fit
from .problem import Item
from .sensitivity import DATA_FREE, Progress, Settings, weight_errors
from .streamed import CALIBRATED, measure_streamed, sensitivity_spec

VERSION = 1  # of the planning: other candidates or other losses are another plan


@dataclass(frozen=True)
class Fit:
    """A budget for the whole output directory; `compress` takes it in place of a recipe.

    With calibration, formats are made by "gptq" and losses measured on the calibration text, else both are data-free
    (`streamed.py`, `sensitivity.py`).

    Attributes:
        size: bytes, as `parse_bytes` reads them; or
        bits: bits per parameter. Exactly one of the two.
        allow: roles besides "expert" that may be compressed too ("shared_expert", "attention", "dense"); each tensor of
            them may also stay as it is.
        candidates: settings of recipe rules to choose from; None for `CALIBRATED` or `DATA_FREE`. {"format": "keep"}
            keeps a tensor as it is.
    """

    size: str | int | None = None
    bits: float | None = None
    allow: tuple[str, ...] = ()
    candidates: tuple[Settings, ...] | None = None

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if (self.size is None) == (self.bits is None):
            raise QmoeError("E_VALUE", "allocation: give either a size or bits per parameter")
        for role in self.allow:
            if role not in COMPRESSIBLE:
                raise QmoeError("E_VALUE", "allocation: unknown role", expected=list(COMPRESSIBLE), actual=role)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("expert", *self.allow)))

    def budget(self, checkpoint: SourceCheckpoint) -> int:
        """Bytes. Raises `E_VALUE`."""
        return parse_bytes(self.size) if self.size is not None else bytes_for_bits(self.bits or 0.0, checkpoint)


@dataclass(frozen=True)
class Planned:
    """The recipe that a budget has become, what qmoe.json says of how (`FitPlan.summary`), and what memory measuring
    may take on top of what compression takes."""

    recipe: Recipe
    summary: dict[str, Any]
    memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_dict(), "summary": self.summary}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Planned:
        return cls(Recipe.from_dict(data["recipe"]), data["summary"])


def plan_output(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    output: Path,
    fit: Fit,
    calibration: CalibrationSpec | None,
    *,
    device: str,
    group: Group,
    max_shard_bytes: int,
    progress: Progress | None,
    finished: Mapping[str, Any] | None,
) -> Planned:
    """Plans the compression of a checkpoint into `output`, or takes up the plan that is there. All processes of `group`
    call it together.

    Args:
        finished: qmoe.json of the output, where that is finished already.

    Raises:
        QmoeError: `E_VALUE` (too small a budget, no weights of these roles, an output that holds something else),
            `E_CHANGED` (it is another compression's), and as calibration does.
    """
    targets = [target for target in layout.targets if target.role in fit.roles]
    if not targets:
        raise QmoeError("E_VALUE", "no weights of these roles", file=checkpoint.directory, actual=list(fit.roles))
    prepared = None
    if calibration is not None:
        prepared = load_calibration(checkpoint, sensitivity_spec(calibration), device, group, measuring=True)
    candidates = fit.candidates
    if candidates is None:
        candidates = (*DATA_FREE, {"format": "keep"}) if calibration is None else CALIBRATED
    from .. import __version__

    job = {
        "planning": VERSION,
        "library": __version__,
        "source": checkpoint.fingerprint(),
        "roles": list(fit.roles),
        "candidates": [dict(settings) for settings in candidates],
        "measured_on": None if prepared is None else prepared.description,
    }
    budget = fit.budget(checkpoint)
    request = {"budget": budget, "roles": list(fit.roles), "measured_on": job["measured_on"]}
    if finished is not None:
        told = finished["job"].get("fit")
        check_same_job({"fit": told and told["request"]}, {"fit": request}, output)
        return Planned(Recipe.from_dict(finished["job"]["recipe"]), told)
    memory = 0 if prepared is None else prepared.memory_bytes
    with ExitStack() as stack:
        journal, planned = None, None
        if group.leads:
            journal = stack.enter_context(Journal(output, "fit-"))
            _check_unbegun(output)
            journal.begin({**job, "modified": checkpoint.modified()})
            plans = [Planned.from_dict(step["plan"]) for step in journal.steps if "plan" in step]
            planned = next((plan for plan in plans if plan.summary["request"] == request), None)
        planned = group.from_leader(planned)
        if planned is not None:
            return replace(planned, memory_bytes=memory)
        if prepared is not None:
            if not (output / DIRECTORY).is_dir():
                raise QmoeError("E_MISSING", "the output must be where all processes see it", file=output)
            items = measure_streamed(
                checkpoint, layout, targets, candidates, prepared, output / DIRECTORY, journal, progress
            )
        elif journal is not None:
            items = _weight_errors(checkpoint, targets, candidates, journal, progress)
        if journal is not None:
            plan = plan_fit(
                checkpoint.directory, budget, items, max_shard_bytes=max_shard_bytes,
                calibrated=prepared is not None, basis="weights" if prepared is None else "streamed",
            )  # fmt: skip
            planned = Planned(plan.recipe, {"request": request, **plan.summary()})
            journal.note({"plan": planned.to_dict()})
            journal.commit()
        planned = group.from_leader(planned)
    assert planned is not None
    return replace(planned, memory_bytes=memory)


def _weight_errors(
    checkpoint: SourceCheckpoint,
    targets: Sequence[Target],
    candidates: Sequence[Settings],
    journal: Journal,
    progress: Progress | None,
) -> list[Item]:
    for step in journal.steps:
        if "items" in step:
            return [Item.from_dict(entry) for entry in step["items"]]
    roles = {target.role for target in targets}
    items = weight_errors(checkpoint.directory, candidates, roles=roles, progress=progress)
    journal.note({"items": [item.to_dict() for item in items]})
    return items


def _check_unbegun(output: Path) -> None:
    """`E_VALUE` for an output with files of something else; `E_CHANGED` for an unfinished compression without plan."""
    journal = output / DIRECTORY
    with io_errors(output):
        begun = (journal / "job.json").exists()
        names = set(os.listdir(output)) - {DIRECTORY}
    if begun and not (journal / "fit-job.json").exists():
        raise QmoeError(
            "E_CHANGED", "this output was begun without a budget; choose another output or delete this one", file=output
        )
    if names and not begun:
        raise QmoeError(
            "E_VALUE", "the output directory is not empty and holds no unfinished compression", file=output,
            actual=sorted(names)[:5],
        )  # fmt: skip
