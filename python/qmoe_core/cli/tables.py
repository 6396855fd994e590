"""Results as tables for people. Every function returns something that rich can print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation import EvalResult
    from ..generation import GenerateResult
    from ..htmlreport import FormatRow
    from ..quickstart import QuickstartResult
    from ..report import CompressionReport
    from ..runtime.tuning import TuneResult
    from ..verification import VerificationReport


def grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Names on the left, values on the right."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _table(*columns: tuple[str, str]) -> Table:
    """A table from (heading, justification) pairs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify=justify, no_wrap=justify == "right", overflow="fold")  # type: ignore[arg-type]
    return table


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A value with its standard error, "-" where there is none."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def compression(report: CompressionReport) -> Table:
    """The totals of a compression."""
    expert_bits = report.expert_bits_per_weight
    rows = [
        ("output", report.output),
        ("model", f"{report.architecture}, {report.original_parameters:,} parameters"),
        ("size on disk", f"{decimal(report.bytes_on_disk)} of {decimal(report.original_bytes)}"
                         f" ({report.compression_ratio:.2f} times smaller)"),
        ("bits per parameter", f"{report.bits_per_parameter:.3f} (all files, all parameters)"),
    ]  # fmt: skip
    if expert_bits is not None:
        rows.append(("bits per expert weight", f"{expert_bits:.3f}"))
    if report.calibration is not None:
        settings = report.calibration
        rows.append(("calibrated on", f"{settings['tokens']:,} tokens in windows of {settings['window']}"))
        seen = [entry.calibration for entry in report.tensors if entry.role == "expert" and entry.calibration]
        if seen:
            low, high = min(entry["min"] for entry in seen), max(entry["max"] for entry in seen)
            rows.append(("tokens per expert", f"{low:,} to {high:,}"))
        few = sum(len(entry["notes"]) for entry in seen)
        if few:
            rows.append(("rare experts", f"{few} matrices saw few tokens; see qmoe.json, or qmoe inspect --json"))
    if report.seconds:
        limit = decimal(report.rss_limit_bytes)
        grown = decimal(max(0, report.peak_rss_bytes - report.start_rss_bytes))
        rows += [
            ("peak memory", f"{decimal(report.peak_rss_bytes)}, {grown} above the start (promised: at most {limit})"),
            ("time", f"{report.seconds:.1f} s" + (", continuing an interrupted run" if report.resumed else "")),
            ("files", f"{report.read_mb_per_second:.1f} MB/s read, {report.written_mb_per_second:.1f} MB/s written"),
        ]
    return grid(rows)


LOSSES = {
    "streamed": "nats per token of KL divergence",
    "weights": "relative error energy of the weights",
}


def plan(fit: Mapping[str, Any]) -> Table:
    """The formats that were chosen for a budget, and how good that choice is known to be: `CompressionReport.fit`."""
    solution = fit["allocation"]
    proof = "no choice is better" if solution["optimal"] else f"no choice is below {solution['bound']:.4g}"
    rows = [
        ("budget", f"{decimal(fit['budget'])}, {decimal(fit['predicted_bytes'])} of it planned"),
        ("predicted loss", f"{solution['loss']:.4g} {LOSSES[fit['basis']]}; {proof}"),
    ]
    for role, counts in fit["counts"].items():
        text = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
        rows.append((f"{role} tensors", text))
    return grid(rows)


def tensors(report: CompressionReport) -> Table:
    """One row per packed tensor."""
    table = _table(("tensor", "left"), ("shape", "right"), ("format", "left"), ("method", "left"), ("bits", "right"),
                   ("error", "right"), ("zeros", "right"), ("size", "right"))  # fmt: skip
    for entry in report.tensors:
        formats = ", ".join(f"{name} ({count})" for name, count in sorted(entry.formats.items()))
        table.add_row(
            escape(entry.name), " x ".join(map(str, entry.shape)), entry.format if len(entry.formats) == 1 else formats,
            entry.method, f"{entry.bits_per_weight:.3f}", f"{entry.relative_error:.4f}", f"{entry.zero_fraction:.1%}",
            decimal(entry.nbytes),
        )  # fmt: skip
    return table


def evaluation(result: EvalResult) -> Table:
    """One model's quality."""
    rows = [
        ("perplexity", with_error(result.perplexity, result.perplexity_se, 3)),
        ("nll (nats per token)", with_error(result.nll, result.nll_se, 4)),
    ]
    if result.kl is not None:
        rows += [
            ("KL divergence (nats per token)", with_error(result.kl, result.kl_se, 5)),
            ("top-1 agreement", with_error(result.top1_agreement, result.top1_se, 4)),
            ("router agreement", with_error(result.router_agreement, result.router_se, 4)),
        ]
    rows.append(("measured on", f"{result.windows} windows of {result.window} tokens in {result.seconds:.1f} s"))
    return grid(rows)


def speed(result: GenerateResult) -> str:
    """One line below a generated text."""
    first = f"first token after {result.first_token_seconds:.2f} s"
    return f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, {first}"


def tuning(result: TuneResult) -> Table:
    """What was tried, and what was taken."""
    rows = []
    for width, what in (("narrow", "2 and 3 bits"), ("wide", "4 and 8 bits")):
        far, near = (result.values[f"{kind}_{width}"] for kind in ("prefetch", "near"))
        rows.append((what, f"{far} bytes ahead into the second-level cache, {near} into the first"))
        for kind, where in (("prefetch", "second"), ("near", "first"), ("both", "first, beside the best of these")):
            times = result.trials[f"{kind}_{width}"].items()
            rows.append((f"    tried: {where}", ", ".join(f"{value}: {time * 1e6:.0f} us" for value, time in times)))
    direct = ", ".join(f"{value}: {ratio:.2f}" for value, ratio in result.trials["direct_tokens"].items())
    rows += [
        ("tokens that read packed lines", f"up to {result.values['direct_tokens']} (time over unpacked: {direct})"),
    ]
    if result.path:
        rows.append(("kept in", result.path))
    return grid(rows)


def verification(report: VerificationReport) -> Table:
    """The verdict, and one row per problem."""
    checked = (
        f"{report.files} files ({decimal(report.nbytes)}), {report.tensors} tensors, "
        f"{report.matrices} matrices of {report.packed_tensors} packed tensors decoded"
    )
    rows = [("verdict", "sound" if report.ok else f"{len(report.problems)} problems"), ("checked", checked)]
    rows += [(problem.code, f"{problem.file}: {problem.tensor or ''} {problem.message}") for problem in report.problems]
    if report.unknown_files:
        rows.append(("not part of it", ", ".join(report.unknown_files)))
    return grid(rows)


def comparison(rows: Iterable[FormatRow]) -> Table:
    """The quickstart's formats side by side."""
    table = _table(("format", "left"), ("size", "right"), ("bits/parameter", "right"), ("bits/expert weight", "right"),
                   ("perplexity", "right"), ("KL", "right"), ("top-1", "right"), ("router", "right"),
                   ("tokens/s", "right"))  # fmt: skip
    for row in rows:
        quality = row.quality
        compared = row.is_original
        table.add_row(
            row.name, decimal(row.bytes_on_disk), f"{row.bits_per_parameter:.2f}", f"{row.bits_per_expert_weight:.2f}",
            with_error(quality.perplexity, quality.perplexity_se, 2),
            *(["-"] * 3 if compared else [f"{quality.kl:.4f}", f"{quality.top1_agreement:.1%}",
                                          f"{quality.router_agreement:.1%}"]),
            f"{row.tokens_per_second:.0f}",
        )  # fmt: skip
    return table


def files(result: QuickstartResult) -> Table:
    """What the quickstart wrote, and what to do next."""
    rows: list[tuple[str, Any]] = [("report", str(result.html)), *(("plot", str(plot)) for plot in result.plots)]
    rows += [("results", str(result.json)), ("time", f"{result.seconds:.0f} s")]
    rows.append(("next", f"qmoe inspect {result.example}"))
    return grid(rows)
