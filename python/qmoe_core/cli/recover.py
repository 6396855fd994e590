"""qmoe recover: tune what is continuous in a compressed checkpoint to the original's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import QmoeError
from .output import Output, UsageError, reporting

if TYPE_CHECKING:
    from ..recovery import RecoveryReport


def run_recovery(
    out: Output,
    source: Path,
    compressed: Path,
    output: Path,
    tokens: Any,
    *,
    device: str = "cpu",
    **settings: Any,
) -> RecoveryReport:
    """Recovers with a progress bar and shows the outcome. `settings` are fields of `RecoverySpec`; None leaves the
    default."""
    from ..recovery import RecoverySpec, recover

    given = {name: value for name, value in settings.items() if value is not None}
    try:
        spec = RecoverySpec(**given)
    except QmoeError as error:  # options that make no sense are wrong usage, not refused input
        raise UsageError(str(error)) from error
    with out.progress() as progress:
        report = recover(source, compressed, output, tokens, spec, device=device, progress=progress)
    what = "KL divergence" if spec.mode == "end-to-end" else "layer error"
    out.show(f"{what} on held-out windows {report.initial:.4f} before, {report.final:.4f} after {report.steps} steps")
    out.show(f"{report.bits_per_parameter:.3f} bits per parameter, {report.bytes_on_disk:,} bytes in {report.output}")
    return report


def command(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The original checkpoint.", show_default=False)],
    compressed: Annotated[Path, typer.Argument(metavar="DIR", help="What it was compressed to.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.", show_default=False)],
    tokens: Annotated[Path | None, typer.Option(help="A .npy file of token ids.", show_default=False)] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file, encoded with the model's tokenizer.", show_default=False)
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="CLASSES",
            help="What to tune: scales, norms, router, attention, shared_expert, dense, embedding, lm_head, other.",
            show_default="scales,norms,router",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="end-to-end, or block: layer by layer, for models too large for that.", show_default="end-to-end"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps (block: per layer).", min=1, show_default="400")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.", min=1, show_default="16")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window.", min=2, show_default="512")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, tf32 or bfloat16.", show_default="float32")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the windows.", min=0, show_default="0")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Tune scales, norms and routers of a compressed checkpoint to the original's predictions.

    Codes stay as they are, and so does the size. Use text of the kind that the model is for, never that of a test.
    Interrupted, the same command continues.
    """
    with reporting(context, as_json) as out:
        if (tokens is None) == (text is None):
            raise UsageError("give either --tokens or --text")
        from ..evaluation import read_ids
        from .app import _text

        ids = read_ids(tokens) if tokens is not None else _text(text, source)
        report = run_recovery(
            out, source, compressed, output, ids, device=device, mode=mode, steps=steps, batch=batch, window=window,
            dtype=dtype, seed=seed, parameters=None if tune is None else tuple(tune.split(",")),
        )  # fmt: skip
        out.result(report.to_dict())
