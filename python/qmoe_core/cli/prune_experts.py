"""`qmoe prune-experts`: a checkpoint with fewer experts."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CalibrationTokens, CalibrationWindow, Json
from .output import Output, UsageError, reporting
from .tables import grid

if TYPE_CHECKING:
    from ..sparsify.expert_job import ExpertReport


class Score(str, Enum):
    """Names of sparsify.saliency.SCORES, repeated here because that module imports torch; a test compares the two."""

    reap = "reap"
    frequency = "frequency"
    ean_sum = "ean_sum"
    ean_mean = "ean_mean"


def command(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face MoE checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.", show_default=False)],
    keep: Annotated[
        str,
        typer.Option(metavar="COUNT|SHARE", help="Experts of every layer that stay: 96, or 0.75.", show_default=False),
    ],
    calibration: Annotated[
        str,
        typer.Option(
            metavar="TEXT|DATASET|NPY", help="On what experts are watched, as in compress.", show_default=False
        ),
    ],
    score: Annotated[Score, typer.Option(help="By what the experts that stay are chosen.")] = Score.reap,
    calibration_tokens: CalibrationTokens = None,
    calibration_window: CalibrationWindow = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Take out the experts that matter least on a text.

    The output is a smaller model of the same class, routers and config.json included. Interrupted, the same command
    continues.
    """
    quiet = os.environ.get("RANK", "0") != "0"
    with reporting(context, as_json, quiet) as out:
        try:
            count = int(keep) if keep.isdigit() else float(keep)
        except ValueError as error:
            raise UsageError(f"--keep takes a number of experts or a share of them, not '{keep}'") from error
        from .app import calibration_of

        spec = calibration_of(calibration, calibration_tokens, calibration_window, False, False)
        assert spec is not None
        from ..sparsify.expert_job import prune_experts

        with out.progress() as progress:
            report = prune_experts(
                source, output, count, spec, score=score.value, device=device, progress=progress
            )  # fmt: skip
        _show(out, report)
        out.result(report.to_dict())


def _show(out: Output, report: ExpertReport) -> None:
    lost = [
        sum(tokens for number, tokens in enumerate(layer.tokens) if number not in set(layer.kept)) / sum(layer.tokens)
        for layer in report.layers
    ]
    rows = [
        ("output", report.output),
        ("experts", f"{report.keep} of {report.experts} in each of {len(report.layers)} layers, by {report.score}"),
        ("parameters", f"{report.parameters:,} of {report.original_parameters:,}"),
        ("routed to others now", f"{min(lost):.1%} to {max(lost):.1%} of a layer's choices"),
        *([("left out", f"{len(report.left_out)} tensors of draft heads")] if report.left_out else []),
        ("watched on", f"{report.calibration['tokens']:,} tokens in windows of {report.calibration['window']}"),
        ("time", f"{report.seconds:.1f} s" + (", continuing an interrupted run" if report.resumed else "")),
    ]
    out.show(grid(rows))
