"""qmoe scaling: what sparsity, size and data lead to, from published or own scaling laws."""

from __future__ import annotations

import csv
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import QmoeError
from .options import Json
from .output import reporting

if TYPE_CHECKING:
    from ..sparsify.scaling import ScalingFit, ScalingLaw

app = typer.Typer(help="Scaling laws of sparse models: predict, choose a sparsity, fit your own.", no_args_is_help=True)

COLUMNS = ("sparsity", "nonzero_parameters", "data", "loss")

Law = Annotated[str, typer.Option(help="t5 (C4, tokens), vit (JFT-4B, images), or a file of qmoe scaling fit.")]
Nonzero = Annotated[
    float, typer.Option("--nonzero", "-n", help="Parameters that are not zero, without embeddings.", show_default=False)
]
Sparsity = Annotated[float, typer.Option("--sparsity", "-s", help="In [0, 1).", show_default=False)]
Compute = Annotated[float, typer.Option("--compute", "-c", help="FLOPs of the training.", show_default=False)]


class CostOfTraining(str, Enum):
    """Names of sparsify.scaling.Cost."""

    dense = "dense"
    gradual = "gradual"


class ResidualType(str, Enum):
    """Names of sparsify.scaling_fit.Residual."""

    log = "log"
    linear = "linear"


def _law(name: str) -> ScalingLaw:
    from ..sparsify.scaling import ScalingLaw, load_law

    published = {"t5": ScalingLaw.t5, "vit": ScalingLaw.vit}
    return published[name]() if name in published else load_law(name)


@app.command()
def predict(
    context: typer.Context,
    sparsity: Sparsity,
    nonzero: Nonzero,
    data: Annotated[float, typer.Option("--data", "-d", help="Tokens (vit: images) of training.", show_default=False)],
    law: Law = "t5",
    as_json: Json = False,
) -> None:
    """The loss of a sparse model, and the dense model that reaches it on the same data."""
    with reporting(context, as_json) as out:
        used = _law(law)
        loss, gain = used.predict(sparsity, nonzero, data), used.gain(sparsity)
        dense = used.dense_equivalent(sparsity, nonzero)
        out.show(f"loss {loss:.4f}; as good as a dense model of {dense:.4g} parameters ({gain:.2f} times the nonzeros)")
        out.result({"law": asdict(used), "loss": loss, "gain": gain, "dense_equivalent": dense})


@app.command()
def optimal(
    context: typer.Context,
    nonzero: Nonzero,
    compute: Compute,
    law: Law = "t5",
    cost: Annotated[CostOfTraining, typer.Option(help="What zeros cost in training.")] = CostOfTraining.gradual,
    flops: Annotated[float, typer.Option(help="Per parameter and token; for images, times the tokens of one.")] = 6.0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the optimum around this point (.svg, .png, .pdf).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """The sparsity of least loss for a size at inference and a budget of training compute."""
    with reporting(context, as_json) as out:
        used = _law(law)
        sparsity = used.optimal_sparsity(nonzero, compute, cost.value, flops=flops)
        data = used.data_for(sparsity, nonzero, compute, cost.value, flops=flops)
        loss = used.predict(sparsity, nonzero, data)
        dense_loss = used.predict(0.0, nonzero, used.data_for(0.0, nonzero, compute, cost.value, flops=flops))
        out.show(
            f"sparsity {sparsity:.3f}: {nonzero / (1 - sparsity):.4g} parameters of which {nonzero:.4g} stay, "
            f"trained on {data:.4g}; loss {loss:.4f}, dense {dense_loss:.4f}"
        )
        result = {"law": asdict(used), "sparsity": sparsity, "data": data, "loss": loss, "dense_loss": dense_loss}
        if plot is not None:
            import numpy as np

            from ..sparsify.scaling_plots import plot_optimal, save

            around = np.geomspace(0.01, 100, 81)
            ax = plot_optimal(used, nonzero * around, compute * around, cost=cost.value, flops=flops)
            ax.plot([compute], [nonzero], "k+", markersize=10)
            save(plot, ax)
            result["plot"] = str(plot)
        out.result(result)


@app.command()
def fit(
    context: typer.Context,
    runs: Annotated[
        Path, typer.Argument(metavar="CSV", help=f"Finished runs: {', '.join(COLUMNS)}.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the law here, for --law.", show_default=False)
    ] = None,
    residual: Annotated[ResidualType, typer.Option(help="Of losses or their logarithms.")] = ResidualType.log,
    delta: Annotated[float, typer.Option(help="Residuals above this count linearly.")] = 1e-3,
    starts: Annotated[int, typer.Option(help="Random starts.", min=1)] = 25,
    bootstrap: Annotated[int, typer.Option(help="Repetitions for the intervals; 0 for none.", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="Of starts and repetitions.", min=0)] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw measured against predicted losses (.svg, .png, .pdf).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit the law to your own runs, with 90 % intervals of its coefficients."""
    with reporting(context, as_json) as out:
        from ..sparsify.scaling import ScalingLaw, save_law

        columns = _read_runs(runs)
        fitted = ScalingLaw.fit(
            *columns, residual=residual.value, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed
        )
        intervals = _intervals(fitted)
        table = Table("coefficient", "value", "90 % interval")
        for name, value in asdict(fitted.law).items():
            interval = intervals.get(name)
            table.add_row(name, f"{value:.5g}", "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}")
        agreeing = int((fitted.objectives <= fitted.objective * (1 + 1e-3)).sum())
        out.show(table)
        out.show(
            f"{len(columns[0])} runs; largest error {abs(fitted.errors).max():.2%}; "
            f"{agreeing} of {starts} starts end here"
        )
        result = {"law": asdict(fitted.law), "intervals": intervals, "objective": fitted.objective}
        result |= {"largest_error": float(abs(fitted.errors).max()), "starts": starts, "agreeing_starts": agreeing}
        if output is not None:
            save_law(output, fitted.law)
            result["output"] = str(output)
        if plot is not None:
            from ..sparsify.scaling_plots import plot_fit, save

            save(plot, plot_fit(fitted))
            result["plot"] = str(plot)
        out.result(result)


def _intervals(fitted: ScalingFit) -> dict[str, tuple[float, float]]:
    """90 % intervals by coefficient; empty without repetitions."""
    names = list(asdict(fitted.law)) if fitted.samples else []
    return {name: fitted.interval(lambda law, name=name: getattr(law, name)) for name in names}  # type: ignore[misc]


def _read_runs(path: Path) -> tuple[list[float], ...]:
    """The columns of COLUMNS, in that order; others are ignored."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = set(COLUMNS) - set(rows.fieldnames or ())
        if missing:
            raise QmoeError("E_MISSING", f"no column {', '.join(sorted(missing))}", file=path)
        columns: tuple[list[float], ...] = tuple([] for _ in COLUMNS)
        for row in rows:
            for name, column in zip(COLUMNS, columns, strict=True):
                try:
                    column.append(float(row[name]))
                except (TypeError, ValueError):
                    text = f"line {rows.line_num}: {name} is no number"
                    raise QmoeError("E_CORRUPT", text, file=path, actual=row[name]) from None
    return columns
