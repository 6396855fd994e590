"""`qmoe prune`: zeros in the weights of a checkpoint."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from ..errors import QmoeError
from .options import CalibrationTokens, CalibrationWindow, Json
from .output import Output, UsageError, reporting
from .tables import grid

if TYPE_CHECKING:
    from ..sparsify.report import PruneReport


class PruneMethod(str, Enum):
    """Names of sparsify.methods.METHODS, repeated here because that module imports torch; a test compares the two."""

    magnitude = "magnitude"
    random = "random"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    alps = "alps"


def command(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face MoE checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.", show_default=False)],
    pattern: Annotated[
        str, typer.Option(help="2:4, 4:8, 16:32, block:4x4, channel:0, unstructured or unstructured:row.")
    ] = "2:4",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of zeros, where the pattern does not fix it.", min=0.0, max=1.0, show_default=False),
    ] = None,
    method: Annotated[
        PruneMethod | None,
        typer.Option(help="How weights are chosen.", show_default="sparsegpt with --calibration, else magnitude"),
    ] = None,
    distribution: Annotated[str, typer.Option(help="uniform, erk, or global (with magnitude).")] = "uniform",
    roles: Annotated[str, typer.Option(help="What to prune: expert, shared_expert, attention, dense.")] = "expert",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the method, e.g. damping=0.1.", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|DATASET|NPY", help="What calibrated methods calibrate on, as in compress.", show_default=False
        ),
    ] = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_window: CalibrationWindow = None,
    device: Annotated[str, typer.Option(help="Where calibrated methods compute: cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Set weights of a checkpoint to zero, in a pattern, where it costs least.

    The output has the names, shapes and types of the source, and loads like it; masks.qmoe beside it says which weights
    were kept. Interrupted, the same command continues.
    """
    quiet = os.environ.get("RANK", "0") != "0"
    with reporting(context, as_json, quiet) as out:
        from .app import calibration_of, setting

        chosen = method or (PruneMethod.magnitude if calibration is None else PruneMethod.sparsegpt)
        spec = calibration_of(calibration, calibration_tokens, calibration_window, False, False)
        from ..sparsify.job import prune_checkpoint
        from ..sparsify.report import PruneSettings

        try:
            settings = PruneSettings(
                chosen.value, pattern, sparsity, distribution, tuple(roles.split(",")), dict(map(setting, option or []))
            )
        except QmoeError as error:  # options that make no sense are wrong usage, not refused input
            raise UsageError(str(error)) from error
        with out.progress() as progress:
            report = prune_checkpoint(source, output, settings, calibration=spec, device=device, progress=progress)
        _show(out, report)
        out.result(report.to_dict())


def _show(out: Output, report: PruneReport) -> None:
    errors = [entry.relative_output_error for entry in report.tensors if entry.relative_output_error is not None]
    rows = [
        ("output", report.output),
        ("pruned", f"{report.weights:,} weights in {len(report.tensors)} tensors, {report.sparsity:.1%} of them zero"),
        ("masks", f"{decimal(report.mask_bytes)}, {report.mask_bits_per_weight:.3f} bits per weight"),
    ]
    if report.calibration is not None:
        settings = report.calibration
        rows.append(("calibrated on", f"{settings['tokens']:,} tokens in windows of {settings['window']}"))
    if errors:
        rows.append(("relative output errors", f"{min(errors):.3f} to {max(errors):.3f}"))
    few = sum(sum(entry.notes.values()) for entry in report.tensors)
    if few:
        rows.append(("rare experts", f"{few} matrices saw few tokens; see prune.json"))
    rows.append(("time", f"{report.seconds:.1f} s" + (", continuing an interrupted run" if report.resumed else "")))
    out.show(grid(rows))
