"""Sparse scaling laws against what was published: fits of the runs, the held-out run, gains, optimal sparsities.

    python bench/compression/scaling.py --json bench/results/scaling.json

The runs in bench/compression/scaling are those of google-research/jaxpruner, projects/bigsparse (arXiv 2309.08520): T5
on C4 and ViT on JFT-4B, with sparsity, nonzero parameters, tokens (images) and validation loss.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_core.sparsify.scaling import Cost, ScalingFit, ScalingLaw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

# T5-XL, 48 x 12 x 1024^2 nonzero parameters, 75 % sparse, 500,000 steps: published with the runs, fitted by nobody.
HELD_OUT = {"sparsity": 0.75, "nonzero": 48 * 12 * 1024**2, "data": 500_000 * 65_536, "loss": 1.4827780204906797}
PUBLISHED_OBJECTIVE = {"vit": 4.929e-4, "t5": 7.60e-6}
SETTINGS: dict[str, dict[str, Any]] = {
    "vit": {"residual": "linear", "delta": 0.01},
    "t5": {"residual": "log", "delta": 0.001},
}


def measure(name: str) -> dict[str, Any]:
    """One data set: the published law and ours."""
    s, n, d, loss = np.loadtxt(Path(__file__).with_name("scaling") / f"{name}.csv", delimiter=",", skiprows=1).T
    published = {"vit": ScalingLaw.vit, "t5": ScalingLaw.t5}[name]()
    begun = time.perf_counter()
    fit = ScalingLaw.fit(s, n, d, loss, bootstrap=1000, **SETTINGS[name])
    seconds = time.perf_counter() - begun
    row: dict[str, Any] = {
        "name": name,
        "runs": int(s.size),
        "published": asdict(published),
        "fitted": asdict(fit.law),
        "intervals": {key: interval(fit, key) for key in asdict(fit.law)},
        "published_objective": PUBLISHED_OBJECTIVE[name],
        "objective": fit.objective,
        "agreeing_starts": int((fit.objectives <= fit.objective * 1.001).sum()),
        "starts": int(fit.objectives.size),
        "largest_error": float(np.abs(fit.errors).max()),
        "fit_seconds": seconds,
        "gain_75": published.gain(0.75),
        "gain_75_fitted": fit.law.gain(0.75),
        "gain_75_interval": fit.interval(lambda law: law.gain(0.75)),
    }
    if name == "t5":
        place = HELD_OUT["sparsity"], HELD_OUT["nonzero"], HELD_OUT["data"]
        laws = {"published": published, "fitted": fit.law}
        row["held_out"] = {key: law.predict(*place) / HELD_OUT["loss"] - 1 for key, law in laws.items()}
    costs: tuple[Cost, ...] = ("dense", "gradual")
    row["optimal_difference"] = {cost: against_grid(published, cost) for cost in costs}
    return row


def interval(fit: ScalingFit, key: str) -> tuple[float, float]:
    """90 % of a coefficient."""
    low, high = fit.interval(lambda law: getattr(law, key))
    return low, high


def against_grid(law: ScalingLaw, cost: Cost) -> float:
    """The largest difference of optimal sparsities from a search over 100,000 sparsities, for 100 sizes and budgets."""
    grid = np.linspace(0, 1, 100_001)[:-1]
    sizes, budgets = np.geomspace(1e6, 1e11, 10), np.geomspace(1e17, 1e26, 10)
    found = law.optimal_sparsity(sizes[:, None], budgets, cost)
    best = [
        [grid[np.argmin(law.predict(grid, n, law.data_for(grid, n, c, cost)))] for c in budgets] for n in sizes
    ]  # fmt: skip
    return float(np.abs(found - np.array(best)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    write_results(arguments.json, "scaling", [measure("vit"), measure("t5")])


if __name__ == "__main__":
    main()
