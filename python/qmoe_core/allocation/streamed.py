"""Losses of candidate formats measured while the model streams by, layer by layer: for models of any size.

The original model runs on calibration text as in calibration, but nothing is compressed; in memory are one layer's
weights, of its experts one chunk, and their statistics. With these the calibrated method itself is tried on some rows
of every matrix in every candidate format (quantize/estimate.py). That tells the size of the record, also where codes
are entropy-coded, and the error of the outputs.

What an error is worth: its energy as a share of the energy of the layer's output, the residual stream, times the gain
of that layer, which copies of some windows that run along disturbed tell (calibration/probes.py). Errors of routed
experts count by the tokens that an expert gets and by their routing weights, those of gate and up by the slopes behind
them, those of linear layers by what a small random change does to the layer's output. So losses are in nats per token
of KL divergence, as far as errors are small and independent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..calibration.distributed import Group
from ..calibration.job import Calibration, Start, load_calibration, remove_activations, resumable, run_layers
from ..calibration.layer import LayerResult
from ..calibration.spec import CalibrationSpec
from ..calibration.treatment import Rounding
from ..families import ModelLayout, Target
from ..formats import IntFormat
from ..journal import Journal
from ..progress import ProgressEvent
from ..quantize import MethodSpec, StackStatistics
from ..quantize.estimate import Estimator
from ..source import SourceCheckpoint
from .budget import source_bytes
from .problem import Candidate, Item
from .sensitivity import Progress, Settings, targets_of, tries_of

# A third of a bit apart or so, from about half a bit to eight. What a rate means depends on the model.
CALIBRATED: tuple[Settings, ...] = (
    *({"format": "ternary", "method": "gptq", "options": {"rate": rate}} for rate in (10.0, 5.0, 2.5, 1.2, 0.5)),
    *(
        {"format": "int2", "group": group, "method": "gptq", "zero_point": False, "half_step": True}
        for group in (0, 64, 32)
    ),
    *({"format": "int3", "group": group, "method": "gptq"} for group in (0, 128, 32)),
    *({"format": "int4", "group": group, "method": "gptq"} for group in (128, 32)),
    {"format": "int8", "group": 128},
    {"format": "keep"},
)
TOKENS = 32768  # of the calibration's, at most: losses need fewer than codes do
ROWS = 1024  # of each stack that are tried, at least 16 of each matrix
# Sizes of ternary records are those of a sample, and of weights that lean on the original's activations: what they have
# turned out to exceed the prediction by, as a share.
MARGIN = 0.02

Row = dict[str, Any]  # {"role", "candidates": [[number, nbytes, loss], ...]} of one target: plain JSON types


def sensitivity_spec(spec: CalibrationSpec) -> CalibrationSpec:
    """What of a calibration losses are measured on."""
    return replace(spec, drift=False, max_tokens=max(spec.window, min(spec.max_tokens, TOKENS)))


class Collector:
    """Takes a layer's matrices and statistics (`calibration.experts.Measure`), and tries every candidate on them."""

    def __init__(self, candidates: Sequence[Settings]) -> None:
        self.candidates = candidates
        self.rows: dict[str, Row] = {}

    def __call__(
        self, target: Target, weights: torch.Tensor, statistics: StackStatistics, factor: torch.Tensor
    ) -> None:
        rows = max(16, -(-ROWS // target.shape[0]))
        estimator = Estimator(weights, statistics, rows)
        tries = tries_of(target, self.candidates)
        row = self.rows.setdefault(
            target.name, {"role": target.role, "candidates": [[number, 0, 0.0] for number, *_ in tries]}
        )
        for entry, (_, _, spec) in zip(row["candidates"], tries, strict=True):
            if spec is None:
                continue  # kept: no loss, and the size is the source's
            estimate = estimator.of(spec, tensor=target.name)
            entry[1] += estimate.nbytes
            entry[2] += float((estimate.errors.cpu() * factor).sum())

    def take(self, result: LayerResult) -> dict[str, Row]:
        """The rows of a finished layer, as shares of the energy of its whole output."""
        taken, self.rows = self.rows, {}
        for row in taken.values():
            for entry in row["candidates"]:
                entry[2] /= max(result.routed, 1e-30)
        return taken


def _merged(parts: Iterable[Mapping[str, Row]]) -> dict[str, Row]:
    """What the processes have found, added up."""
    total: dict[str, Row] = {}
    for part in parts:
        for name, row in part.items():
            if name not in total:
                total[name] = row
                continue
            for entry, more in zip(total[name]["candidates"], row["candidates"], strict=True):
                entry[1] += more[1]
                entry[2] += more[2]
    return total


def measure_streamed(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    targets: Sequence[Target],
    candidates: Sequence[Settings],
    calibration: Calibration,
    directory: Path,
    journal: Journal | None,
    progress: Progress | None,
) -> list[Item]:
    """One item per target, on the leading process; on the others nothing.

    Args:
        calibration: with `sensitivity_spec`. directory: for activations; all processes must see it.
        journal: of the leading process, in this directory: finished layers are noted there, and taken up again.

    Raises:
        QmoeError: as calibration does.
    """
    group: Group = calibration.group
    steps = resumable(journal, "rows") if journal is not None else []
    whole = bool(steps) and steps[-1]["layer"] + 1 == steps[-1]["layers"]
    start = group.from_leader(None if whole else Start(len(steps), steps[-1]["states"] if steps else []))
    if start is not None:
        collector = Collector(candidates)

        def start_anew() -> None:
            if journal is not None:
                journal.rewind(0)

        def keep(result: LayerResult, layers: int, states: list[dict[str, int]], parts: list[Any]) -> None:
            assert journal is not None
            step = {"layer": result.index, "layers": layers, "rows": _merged(parts), "states": states}
            journal.note(step if result.gains is None else {**step, "gains": result.gains})
            journal.commit()

        def tell(done: int, total: int, detail: str) -> None:
            if progress is not None and group.leads:
                progress(ProgressEvent("sensitivity", done, total, detail))

        decisions = {target.name: (target, Rounding(MethodSpec("gptq", IntFormat(4)))) for target in targets}
        run_layers(
            checkpoint, layout, decisions, calibration, directory, tell, start, start_anew, keep,
            measure=collector, found=collector.take,
        )  # fmt: skip
    if journal is None:
        return []
    remove_activations(directory)
    steps = [step for step in journal.steps if "rows" in step]
    found = {name: (row, steps[-1]["gains"][step["layer"]]) for step in steps for name, row in step["rows"].items()}
    return [_item(checkpoint, target, *found[target.name], candidates) for target in targets]


def streamed_losses(
    directory: str | os.PathLike[str],
    calibration: CalibrationSpec,
    candidates: Sequence[Settings] = CALIBRATED,
    *,
    roles: Iterable[str] = ("expert",),
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Item]:
    """One item per target of these roles of the checkpoint `directory`, by one process and without anything to resume:
    for `plan_fit`, or to compare formats. Raises as `measure_streamed`; `E_VALUE` where there are no such targets."""
    with targets_of(Path(directory), roles) as (checkpoint, layout, targets), TemporaryDirectory() as scratch:
        prepared = load_calibration(checkpoint, sensitivity_spec(calibration), device, Group())
        with Journal(Path(scratch), "fit-") as journal:
            journal.begin({})
            return measure_streamed(checkpoint, layout, targets, candidates, prepared, journal.path, journal, progress)


def _item(checkpoint: SourceCheckpoint, target: Target, row: Row, gain: float, candidates: Sequence[Settings]) -> Item:
    made = []
    for number, nbytes, loss in row["candidates"]:
        settings = dict(candidates[number])
        if settings["format"] == "keep":
            nbytes = source_bytes(checkpoint, target)
        elif settings["format"] == "ternary":
            nbytes = math.ceil(nbytes * (1 + MARGIN))
        made.append(Candidate(nbytes, float(f"{loss * gain:.7g}"), settings))
    return Item(target.name, math.prod(target.shape), tuple(made), target.role)
