"""Plots of sparse scaling laws, in the manner of arXiv 2309.08520. matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import QmoeError
from .scaling import FLOPS, Cost, ScalingFit, ScalingLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_fit(fit: ScalingFit, ax: Axes | None = None) -> Axes:
    """Measured against predicted losses of all runs, one colour per sparsity; runs on the line are fitted exactly."""
    ax = _axes(ax)
    runs = fit.runs
    predicted = fit.law.predict(runs.sparsity, runs.nonzero, runs.data)
    for level in np.unique(runs.sparsity):
        chosen = runs.sparsity == level
        ax.plot(predicted[chosen], runs.loss[chosen], "o", markersize=5, alpha=0.8, label=f"{level:.4g} sparse")
    ends = [min(predicted.min(), runs.loss.min()), max(predicted.max(), runs.loss.max())]
    ax.plot(ends, ends, "--", color="0.4", zorder=0)
    ax.set(xlabel="predicted loss", ylabel="measured loss", xscale="log", yscale="log")
    ax.legend()
    return ax


def plot_optimal(
    law: ScalingLaw,
    N: ArrayLike,
    C: ArrayLike,
    ax: Axes | None = None,
    *,
    cost: Cost = "gradual",
    flops: float = FLOPS,
    levels: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 0.875, 0.9375),
) -> Axes:
    """Contours of equal optimal sparsity over nonzero parameters and training compute.

    Args:
        N, C: the values of the two axes, shapes (n,) and (c,), ascending; see `ScalingLaw.optimal_sparsity`.

    Raises:
        QmoeError: E_SHAPE if either has fewer than two values, or dimensions other than one.
    """
    n, c = np.asarray(N, np.float64), np.asarray(C, np.float64)
    if n.ndim != 1 or c.ndim != 1 or min(n.size, c.size) < 2:
        raise QmoeError("E_SHAPE", f"N and C are the values of two axes, not arrays of shapes {n.shape} and {c.shape}")
    ax = _axes(ax)
    sparsity = law.optimal_sparsity(n[:, None], c[None, :], cost, flops=flops)
    ax.set(xlabel="training compute, FLOPs", ylabel="nonzero parameters", xscale="log", yscale="log")
    lines = ax.contour(c, n, sparsity, levels=list(levels), cmap="viridis")
    ax.clabel(lines, fmt=lambda level: f"{level:.4g}")
    return ax


def save(path: str | os.PathLike[str], ax: Axes) -> None:
    """Writes the figure that `ax` belongs to; the format is the file name's ending."""
    figure: Any = ax.figure
    figure.savefig(path)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    axes.grid(alpha=0.3)
    return axes
