"""The commands. Each one parses its options, calls the library, and shows what came back.

The library is imported inside the commands: most of it needs torch, which takes seconds to import.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import QmoeError
from . import tables
from .options import CalibrationTokens, CalibrationWindow, Json
from .output import EXIT_HELP, ExitCode, Output, UsageError, reporting
from .prune import command as prune_command
from .prune_experts import command as prune_experts_command
from .recover import command as recover_command
from .recover import run_recovery
from .scaling import app as scaling_app

if TYPE_CHECKING:
    import numpy as np

    from ..calibration import CalibrationSpec
    from ..recipe import Recipe

app = typer.Typer(
    name="qmoe",
    help="Compress Mixture-of-Experts language models, measure what that costs, and run them small.",
    epilog=EXIT_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.", show_default=False)]
Compressed = Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.", show_default=False)]


class ScaleType(str, Enum):
    """Names of formats.SCALE_DTYPES."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Method(str, Enum):
    """Names of quantize.METHODS, repeated here because that module imports torch; a test compares the two."""

    rtn = "rtn"
    moqe = "moqe"
    finequant = "finequant"
    ternary_minmax = "ternary-minmax"
    ternary_centroid = "ternary-centroid"
    gptq = "gptq"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qmoe {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the program an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face MoE checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.", show_default=False)],
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="int8, int4, int3, int2 or ternary.", show_default="int4")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="int: columns that share a scale: 16, 32, 64, 128, or 0 for a row.", show_default="128"),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="How values are chosen.", show_default="by format; gptq with --calibration"),
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero points; ternary: one level per row.")] = False,
    half_step: Annotated[
        bool, typer.Option("--half-step", help="int: zero halfway between two codes; for int2 by gptq.")
    ] = False,
    scale_dtype: Annotated[
        ScaleType | None, typer.Option(help="int: type of the scales.", show_default="float16")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the method, e.g. rate=1.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML recipe instead of the seven options above.", show_default=False)
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose formats so that the directory fits into this, e.g. 24GiB, and loses least.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="The same, as bits per parameter of the whole directory.", show_default=False)
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES",
            help="--fit, --bits: compress these too: shared_expert,attention,dense.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|DATASET|NPY",
            help="What calibrated methods calibrate on: a UTF-8 text file, a .npy file of token ids, or a Hugging Face "
            "data set (NAME, NAME:CONFIGURATION or a local directory).",
            show_default=False,
        ),
    ] = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_window: CalibrationWindow = None,
    drift: Annotated[
        bool, typer.Option("--drift", help="Also run the original, to correct for what has drifted: twice the time.")
    ] = False,
    gate_weighted: Annotated[
        bool, typer.Option("--gate-weighted", help="Tokens count by their routing weights; better for ternary.")
    ] = False,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover", help="Then tune scales, norms and routers on the calibration text; see qmoe recover."
        ),
    ] = False,
    recover_steps: Annotated[int | None, typer.Option(help="Its optimizer steps.", min=1, show_default="400")] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write report.html and its plots into this directory.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where calibrated methods compute: cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Compress the experts of a checkpoint into a new directory.

    Interrupted, the same command continues where it stopped and ends with the same bytes. The source is only read.
    Calibration runs on several devices with: torchrun --nproc-per-node=N -m qmoe_core compress ...
    """
    quiet = os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first one speaks for all
    # The outer context is left last: a process that goes takes the others with it, and the first is to speak before.
    with ExitStack() as outer, reporting(context, as_json, quiet) as out:
        budgeted = fit is not None or bits is not None
        if method is None and recipe is None and calibration is not None and not budgeted:
            method = Method.gptq
        settings = calibration_of(calibration, calibration_tokens, calibration_window, drift, gate_weighted)
        if recover and settings is None:
            raise UsageError("--recover tunes on the text of --calibration")
        if recover_steps is not None and not recover:
            raise UsageError("--recover-steps needs --recover")
        if recover and (output / "config.json").exists():
            raise UsageError(f"{output} is finished already; qmoe recover takes a compressed directory further")
        if budgeted:
            if (
                (fit is None) == (bits is None)
                or (recipe, format, group, method, scale_dtype) != (None,) * 5
                or symmetric
                or half_step
                or option
            ):
                raise UsageError("give either --fit or --bits, and no options that describe a format")
        elif allow is not None:
            raise UsageError("--allow needs --fit or --bits")
        else:
            chosen: Recipe | Fit = _recipe(
                format, group, method, symmetric, half_step, scale_dtype, option or [], recipe
            )
        from .. import compress as run
        from ..calibration.distributed import processes
        from ..calibration.spec import tokens_for

        if budgeted:
            from ..allocation import Fit

            chosen = Fit(fit, bits, tuple(allow.split(",")) if allow else ())
        team = outer.enter_context(processes())
        # What is still to be recovered lies beside the output, until that is whole.
        first = output.with_name(output.name + ".unrecovered") if recover else output
        with out.progress() as progress:
            report = run(
                source, first, chosen, calibration=settings, device=device, progress=progress,
                planned=lambda plan: out.show(tables.plan(plan)),
            )  # fmt: skip
        out.show(tables.compression(report))
        result = report.to_dict()
        if html is not None and team.leads:
            from ..htmlreport import write_compression

            result["html"] = str(write_compression(html, report).html)
            out.show(f"report: {result['html']}")
        if recover and settings is not None:
            with team.shared_errors():
                if team.leads:
                    # Recovery takes more text than calibration does: all of it.
                    text = tokens_for(source, replace(settings, max_tokens=sys.maxsize, seed=None))
                    recovered = run_recovery(out, source, first, output, text, device=device, steps=recover_steps)
                    result["recovery"] = recovered.to_dict()
                    shutil.rmtree(first)
                team.barrier()
        out.result(result)


def _recipe(
    format: str | None,
    group: int | None,
    method: Method | None,
    symmetric: bool,
    half_step: bool,
    scale_dtype: ScaleType | None,
    options: list[str],
    recipe: Path | None,
) -> Recipe:
    """The recipe that the options describe. Options that make no sense are wrong usage, not refused input."""
    given = (format, group, method, scale_dtype, symmetric or None, half_step or None, options or None)
    if recipe is not None and any(value is not None for value in given):
        raise UsageError("a recipe says everything: leave out the options that describe a format")
    from .. import Recipe

    if recipe is not None:
        return Recipe.from_toml(recipe)
    format = format or ("ternary" if method is not None and method.value.startswith("ternary") else "int4")
    settings: dict[str, Any] = {"group": group, "method": method.value if method else None}
    settings["scale_dtype"] = scale_dtype.value if scale_dtype else None
    if symmetric:
        settings |= {"levels": "symmetric"} if format.startswith("ternary") else {"zero_point": False}
    if half_step:
        settings["half_step"] = True
    settings["options"] = dict(setting(text) for text in options)
    try:
        return Recipe.uniform(format, **settings)
    except QmoeError as error:
        raise UsageError(str(error).removeprefix(f"{error.code}: ").removeprefix("recipe.")) from error


def setting(text: str) -> tuple[str, float | int | str]:
    """KEY=VALUE as key and value, a number where it is one."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(f"--option takes KEY=VALUE, not '{text}'")
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


def calibration_of(
    source: str | None, tokens: int | None, window: int | None, drift: bool, gate_weighted: bool
) -> CalibrationSpec | None:
    """What the options say of calibration, or None."""
    settings: dict[str, Any] = {"max_tokens": tokens, "window": window}
    settings |= {"drift": drift or None, "gate_weighted": gate_weighted or None}
    given = {name: value for name, value in settings.items() if value is not None}
    if source is None:
        if given:
            raise UsageError("the options of calibration need --calibration")
        return None
    from .. import CalibrationSpec

    return CalibrationSpec(source, **given)


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Model,
    reference: Annotated[
        Path | None, typer.Option(help="The original, to compare with: KL divergence, agreements.", show_default=False)
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="A .npy file of token ids.", show_default=False)] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file, encoded with the model's tokenizer.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per disjoint window.", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="How many tokens of the front to use.", min=2)] = 65536,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 8,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and what was lost against the original, with standard errors. Everything in float32."""
    with reporting(context, as_json) as out:
        if (tokens is None) == (text is None):
            raise UsageError("give either --tokens or --text")
        from .. import evaluate as run
        from ..evaluation import read_ids

        ids = read_ids(tokens) if tokens is not None else _text(text, model)

        with out.progress() as progress:
            result = run(
                model, ids, reference=reference, window=window, max_tokens=max_tokens, batch_size=batch_size,
                progress=progress,
            )  # fmt: skip
        out.show(tables.evaluation(result))
        out.result({"model": model, "reference": reference, **result.to_dict()})


def _text(path: Path | None, model: Path) -> np.ndarray:
    """A text file's token ids, by the model's own tokenizer."""
    from ..evaluation import encode_text
    from ..generation import load_tokenizer

    assert path is not None
    if not path.exists():
        raise QmoeError("E_MISSING", "no such file", file=path)
    try:
        return encode_text(load_tokenizer(model), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise QmoeError("E_CORRUPT", f"not UTF-8: {error}", file=path) from error


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus for sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    compute: Annotated[
        str,
        typer.Option(
            help="How packed layers multiply: int8 (activations rounded to int8), float, stored (float, without a "
            "second copy of the weights), or auto: int8 for 16-bit activations, else float."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, or a CUDA device such as cuda or cuda:1.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text, token by token as it comes."""
    with reporting(context, as_json) as out:
        from ..generation import generate as run
        from ..generation import load_model, load_tokenizer

        tokenizer = load_tokenizer(model)
        loaded = load_model(model, device=device, compute=compute)
        stream = _Stream(out, tokenizer, prompt)
        result = run(
            loaded, tokenizer, prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            on_token=stream.add,
        )  # fmt: skip
        stream.finish()
        out.result({"model": model, "prompt": prompt, **result.to_dict()})
        if not as_json:
            out.errors.print(tables.speed(result), style="dim")


class _Stream:
    """Writes text as tokens arrive; a token may end in the middle of a character, which then waits for the next one."""

    def __init__(self, out: Output, tokenizer: Any, prompt: str) -> None:
        self.out, self.tokenizer, self.prompt = out, tokenizer, prompt
        self.tokens: list[int] = []
        self.written = 0

    def add(self, token: int) -> None:
        if not self.tokens:
            self.out.write(self.prompt)
        self.tokens.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):
            self.out.write(text[self.written :])
            self.written = len(text)

    def finish(self) -> None:
        self.out.write(self._text()[self.written :] + "\n")

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text


@app.command()
def tune(
    context: typer.Context,
    threads: Annotated[int, typer.Option(help="0 takes all that may be used.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Measure how this machine's kernels run fastest, and keep it for later processes. Results do not depend on it."""
    with reporting(context, as_json) as out:
        from ..runtime.tuning import tune as run

        result = run(threads, progress=lambda what: out.errors.print(what, style="dim"))
        out.show(tables.tuning(result))
        out.result(result.to_dict())


@app.command()
def inspect(context: typer.Context, directory: Compressed, as_json: Json = False) -> None:
    """Show what a compressed checkpoint holds: tensor, format, bits, error."""
    with reporting(context, as_json) as out:
        from ..checkpoint import load_report

        report = load_report(directory)
        out.show(tables.tensors(report))
        if report.fit is not None:
            out.show(tables.plan(report.fit))
        out.show(tables.compression(report))
        out.result(report.to_dict())


@app.command()
def verify(context: typer.Context, directory: Compressed, as_json: Json = False) -> None:
    """Check every size and checksum, and decode every packed tensor. Exit code 4 if anything is wrong."""
    with reporting(context, as_json) as out:
        from ..verification import verify as run

        with out.progress() as progress:
            report = run(directory, progress=progress)
        out.show(tables.verification(report))
        out.result(report.to_dict())
        if not report.ok:
            raise typer.Exit(ExitCode.FAILED)


@app.command()
def quickstart(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where models and report go.")] = Path(
        "qmoe-quickstart"
    ),
    max_tokens: Annotated[int, typer.Option(help="Tokens of the held-out text to evaluate on.", min=64)] = 8192,
    window: Annotated[int, typer.Option(help="Tokens per disjoint window.", min=2)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate with each model.", min=2)] = 64,
    as_json: Json = False,
) -> None:
    """The whole story on the bundled model: compress, evaluate, generate, and an HTML report with plots."""
    with reporting(context, as_json) as out:
        from ..quickstart import quickstart as run

        with out.progress() as progress:
            result = run(output, max_tokens=max_tokens, window=window, max_new_tokens=new_tokens, progress=progress)
        out.show(tables.comparison(result.rows))
        out.show(tables.files(result))
        out.result(result.to_dict())


app.command("recover")(recover_command)
app.command("prune")(prune_command)
app.command("prune-experts")(prune_experts_command)
app.add_typer(scaling_app, name="scaling")
