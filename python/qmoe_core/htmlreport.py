"""A comparison of formats, or one compression, as one self-contained HTML page, its plots also as PNG files beside it.

matplotlib and jinja2 are imported when a report is written; importing this module needs neither.
"""

from __future__ import annotations

import base64
import datetime
import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluation import EvalResult
from .store import io_errors, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import CompressionReport

# Readable on white, distinct without red against green, one per format in order.
COLOURS = ("#4c566a", "#3366aa", "#11889a", "#e0912f", "#b8487a", "#6b4fa0", "#8a6d3b", "#5b8c3e")
DPI = 130


@dataclass(frozen=True)
class FormatRow:
    """One format of one model.

    Attributes:
        bits_per_parameter: all bytes on disk x 8 / all parameters; `bits_per_expert_weight`: packed experts only.
        bytes_on_disk, packed_bytes: of the directory and, of these, of the expert weights.
        quality: against the original; its KL divergence and agreements say nothing where `is_original`.
        tokens_per_second: of generation at batch 1. `sample`: generated text.
        errors: packed tensor -> ||W - Q|| / ||W||.
    """

    name: str
    bits_per_parameter: float
    bits_per_expert_weight: float
    bytes_on_disk: int
    packed_bytes: int
    quality: EvalResult
    tokens_per_second: float
    sample: str
    is_original: bool = False
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything on the page. `model`: what was compressed; `text`: what it was judged on; `rows`: original first."""

    title: str
    model: str
    text: str
    prompt: str
    rows: tuple[FormatRow, ...]


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    html: Path
    plots: tuple[Path, ...]


def write_report(output: str | os.PathLike[str], report: Report) -> ReportFiles:
    """Writes OUTPUT/report.html and its plots (PNG), each whole or not at all.

    Raises:
        QmoeError: `E_NO_SPACE`, `E_IO`.
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    plots = {
        "quality": ("Quality against size", _plot_quality(report)),
        "agreement": ("Agreement with the original", _plot_agreement(report)),
        "size": ("Size on disk", _plot_size(report)),
        "error": ("Error of the weights", _plot_error(report)),
    }
    return _write(Path(output), "report.html.j2", plots, report=report, quality=report.rows[0].quality)


def write_compression(output: str | os.PathLike[str], report: CompressionReport) -> ReportFiles:
    """The page of one compression, without an evaluation: sizes, errors tensor by tensor and, where formats were chosen
    for a budget, what every other budget would have bought. Arguments and errors as of `write_report`."""
    series = [("relative error ||W - Q|| / ||W||", {entry.name: entry.relative_error for entry in report.tensors})]
    outputs = {e.name: e.relative_output_error for e in report.tensors if e.relative_output_error is not None}
    if outputs:
        series.append(("the same of the outputs", outputs))
    plots = {}
    if report.fit is not None:
        chosen = (report.fit["predicted_bytes"], report.fit["allocation"]["loss"])
        plots["frontier"] = ("What a budget buys", plot_frontier(report.fit["frontier"], chosen, report.fit["basis"]))
    plots["bits"] = ("Bits by tensor", _plot_bits(report))
    plots["error"] = ("Error by tensor", _plot_errors(series))
    return _write(Path(output), "compression.html.j2", plots, report=report)


def _write(output: Path, template: str, plots: Mapping[str, tuple[str, Figure]], **values: Any) -> ReportFiles:
    """Writes plots, and the page that a template makes of them and of the values."""
    import jinja2

    with io_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    paths, embedded = [], {}
    for name, (heading, figure) in plots.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        paths.append(output / f"{name}.png")
        write_atomic(paths[-1], buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        embedded[name] = {"heading": heading, "data": data, "file": paths[-1].name}
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:.2f}"
    page = environment.get_template(template).render(
        plots=embedded, machine=_machine(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), **values,
    )  # fmt: skip
    html = output / "report.html"
    write_atomic(html, page.encode())
    return ReportFiles(html, tuple(paths))


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _machine() -> dict[str, Any]:
    """What the speeds were measured on."""
    import torch

    from . import __version__

    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "qmoe": __version__}


# Plots.


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with recessive axes. Figures are made without pyplot: a library must not touch global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.tick_params(colors="#444444", labelsize=9)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _colours(report: Report) -> dict[str, str]:
    return {row.name: COLOURS[index % len(COLOURS)] for index, row in enumerate(report.rows)}


def _plain_log(ax: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, one, two and five per decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _label_points(ax: Axes, labels: list[tuple[float, float, str, str]], lift: float = 0) -> None:
    """Writes (x, y, text, colour) to the right of each point and `lift` pixels above it, lower where it
    would cover another.
    Call it when the limits of the axes are final."""
    placed: list[tuple[float, float, float]] = []  # left, right and height in pixels
    for x, y, text, colour in sorted(labels, key=lambda label: -label[1]):
        left, height = ax.transData.transform((x, y))
        right = left + 7.0 * len(text) + 14
        moved = height + lift
        while any(left < r and right > other and abs(moved - h) < 15 for other, r, h in placed):
            moved -= 1
        placed.append((left, right, moved))
        points = (moved - height) * 72 / ax.figure.dpi
        ax.annotate(
            text, (x, y), xytext=(11, points), textcoords="offset points", va="center", fontsize=9, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}, zorder=5,
        )  # fmt: skip


def _plot_quality(report: Report) -> Figure:
    """Perplexity over bits per expert weight, one labelled point per format."""
    from matplotlib.ticker import MultipleLocator

    figure, (ax,) = _figure(7.4, 4.6)
    colours = _colours(report)
    values = [row.quality.perplexity for row in report.rows]
    if max(values) > 4 * min(values):
        _plain_log(ax)
    points = sorted(report.rows, key=lambda row: row.bits_per_expert_weight)
    ax.plot(
        [row.bits_per_expert_weight for row in points], [row.quality.perplexity for row in points],
        color="#c8ccd4", linewidth=1.4, zorder=1,
    )  # fmt: skip
    ax.axhline(values[0], color=COLOURS[0], linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    ax.set_xlim(0, max(row.bits_per_expert_weight for row in report.rows) * 1.18)
    labels = []
    for row in report.rows:
        x, y, error = row.bits_per_expert_weight, row.quality.perplexity, row.quality.perplexity_se
        ax.errorbar(x, y, yerr=error, fmt="o", markersize=7, capsize=3, elinewidth=1, color=colours[row.name], zorder=3)
        labels.append((x, y, f"{row.name}  {y:.1f}", colours[row.name]))
    _label_points(ax, labels, lift=10)
    ax.xaxis.set_major_locator(MultipleLocator(2))
    ax.set_xlabel("bits per expert weight, all metadata included")
    ax.set_ylabel("perplexity ± one standard error (lower is better)")
    _title(ax, "What fewer bits cost")
    return figure


def _plot_agreement(report: Report) -> Figure:
    """Two panels: shares of agreement, and KL divergence on a logarithmic axis."""
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in report.rows if not row.is_original]
    figure, (left, right) = _figure(10.0, 4.2, panels=2)
    places = range(len(rows))
    series = (
        ("most likely token", "#3366aa", [(row.quality.top1_agreement, row.quality.top1_se) for row in rows]),
        ("experts chosen", "#e0912f", [(row.quality.router_agreement, row.quality.router_se) for row in rows]),
    )
    for offset, (label, colour, values) in zip((-0.2, 0.2), series, strict=True):
        heights = [value or 0.0 for value, _ in values]
        errors = [error or 0.0 for _, error in values]
        bars = left.bar(
            [x + offset for x in places], heights, 0.38, yerr=errors, capsize=2, label=label, color=colour,
            error_kw={"elinewidth": 1, "ecolor": "#444444"},
        )  # fmt: skip
        left.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=8, padding=2, color="#444444")
    left.set_ylim(0, 1.12)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1])
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_ylabel("share that agrees with the original")
    left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    _title(left, "Same choices as the original")
    colours = _colours(report)
    labels = []
    for x, row in zip(places, rows, strict=True):
        kl = row.quality.kl or 0.0
        right.errorbar(x, kl, yerr=row.quality.kl_se, fmt="o", markersize=7, capsize=3, color=colours[row.name])
        labels.append((float(x), kl, f"{kl:.2g}", "#444444"))
    _plain_log(right)
    right.set_xlim(-0.5, len(rows) - 0.2)
    _label_points(right, labels)
    right.set_ylabel("KL divergence, nats per token")
    _title(right, "Distance of the predictions")
    for ax in (left, right):
        ax.set_xticks(list(places), [row.name for row in rows])
    return figure


def _plot_size(report: Report) -> Figure:
    """Stacked horizontal bars: expert weights, and everything that stays as it is."""
    figure, (ax,) = _figure(7.4, 1.3 + 0.42 * len(report.rows))
    ax.grid(visible=False)
    places = list(range(len(report.rows)))[::-1]
    experts = [row.packed_bytes / 1e6 for row in report.rows]
    others = [(row.bytes_on_disk - row.packed_bytes) / 1e6 for row in report.rows]
    ax.barh(places, experts, color="#3366aa", label="experts", height=0.62)
    label = "everything else (attention, embeddings, tokenizer)"
    ax.barh(places, others, left=experts, color="#c8ccd4", label=label, height=0.62)
    full = report.rows[0].bytes_on_disk
    for place, row in zip(places, report.rows, strict=True):
        share = "" if row.is_original else f"  ({full / row.bytes_on_disk:.1f} times smaller)"
        text = f"  {row.bytes_on_disk / 1e6:.2f} MB{share}"
        ax.text(row.bytes_on_disk / 1e6, place, text, va="center", fontsize=9, color="#444444")
    ax.set_yticks(places, [row.name for row in report.rows])
    ax.set_xlim(0, full / 1e6 * 1.22)
    ax.set_xlabel("MB on disk")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    _title(ax, "Size of the whole directory")
    return figure


def _plot_error(report: Report) -> Figure:
    """Relative error of every packed tensor, one line per format."""
    return _plot_errors([(row.name, row.errors) for row in report.rows if row.errors], _colours(report))


def _plot_errors(series: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str] | None = None) -> Figure:
    """One line per series of (name, packed tensor -> error)."""
    figure, (ax,) = _figure(7.4, 4.4)
    names = sorted({name for _, errors in series for name in errors}, key=_place)
    labels = []
    for number, (title, errors) in enumerate(series):
        colour = COLOURS[number + 1] if colours is None else colours[title]
        points = [(place, errors[name]) for place, name in enumerate(names) if name in errors]
        ax.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1.4, color=colour, label=title)
        labels.append((float(points[-1][0]), points[-1][1], title, colour))
    _plain_log(ax)
    if colours is None:
        ax.legend(frameon=False, fontsize=9)
    else:
        ax.set_xlim(-0.4, len(names) - 1 + max(1.0, 0.2 * len(names)))
        _label_points(ax, labels)
    _tensor_axis(ax, names)
    ax.set_ylabel("relative error" if colours is None else "relative error ||W - Q|| / ||W||")
    _title(
        ax,
        "Error of the weights, tensor by tensor"
        if colours is None
        else "Error of the expert weights, tensor by tensor",
    )
    return figure


def _tensor_axis(ax: Axes, names: Sequence[str]) -> None:
    """Names of tensors below the axis; of many, which would cover each other, every second, third, ..."""
    step = -(-len(names) // 24)
    ticks = list(range(0, len(names), step or 1))
    ax.set_xticks(ticks, [" ".join(map(str, _place(names[tick]))) for tick in ticks], rotation=40, ha="right")
    ax.set_xlabel("layer and tensor")


def _plot_bits(report: CompressionReport) -> Figure:
    """Bits per weight of every packed tensor, one colour per format."""
    figure, (ax,) = _figure(7.4, 4.0)
    entries = sorted(report.tensors, key=lambda entry: _place(entry.name))
    formats = sorted({entry.format for entry in entries})
    for number, format in enumerate(formats):
        places = [place for place, entry in enumerate(entries) if entry.format == format]
        heights = [entries[place].bits_per_weight for place in places]
        ax.bar(places, heights, 0.8, color=COLOURS[(number + 1) % len(COLOURS)], label=format)
    ax.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    _tensor_axis(ax, [entry.name for entry in entries])
    ax.set_ylabel("bits per weight")
    return figure


def plot_frontier(points: Sequence[Sequence[float]], chosen: tuple[float, float], basis: str) -> Figure:
    """The least predicted loss for every size of the directory, (bytes, loss) from small to large, and the choice."""
    figure, (ax,) = _figure(7.4, 4.4)
    shown = [(nbytes / 1e6, loss) for nbytes, loss in points if loss > 0]  # what a logarithmic axis can show
    ax.plot([x for x, _ in shown], [y for _, y in shown], color=COLOURS[1], linewidth=1.8)
    ax.plot([chosen[0] / 1e6], [chosen[1]], "o", markersize=8, color=COLOURS[3], zorder=3)
    if shown:
        _plain_log(ax)
    if chosen[1] > 0:
        _label_points(ax, [(chosen[0] / 1e6, chosen[1], f"{chosen[0] / 1e6:.1f} MB, {chosen[1]:.3g}", COLOURS[3])], 10)
    ax.set_xlabel("MB of the whole directory")
    unit = ", nats per token" if basis == "streamed" else ""
    ax.set_ylabel(f"predicted loss{unit} (lower is better)")
    _title(ax, "The best mix of formats for each size")
    return figure


def _place(name: str) -> tuple[int, str]:
    """Layer and what a tensor is called there: "model.layers.3.mlp.experts.down_proj_qmoe" -> (3, "down_proj"),
    "model.layers.3.self_attn.q_proj.weight_qmoe" -> (3, "q_proj")."""
    parts = name.removesuffix("_qmoe").removesuffix(".weight").split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    return (numbers[0] if numbers else 0), parts[-1]
