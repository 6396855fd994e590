"""The curve of bench/compression/calibrated.py as a picture, beside round to nearest and light recovery.

    python bench/compression/curve.py bench/results/calibrated-novels-moe-28m.json \\
        --plain bench/results/quality-novels-moe-28m.json --recovered bench/results/recovery-novels-moe-28m.json \\
        --output docs/curve.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrated", type=Path)
    parser.add_argument("--plain", type=Path, required=True, help="the same model without calibration")
    parser.add_argument("--recovered", type=Path, help="the same model after recovery")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "qmoe"  # the same picture gives the same file
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = json.loads(arguments.plain.read_text())["rows"]
    points = [(row["bits_per_expert_weight"], row["perplexity"]) for row in plain if row["name"] != "original"]
    axes.plot(*zip(*points, strict=True), "x", color="0.6", label="without calibration")
    result = json.loads(arguments.calibrated.read_text())
    original, *rows = result["rows"]
    for kind, marker in (("int", "o"), ("ternary", "s")):
        points = sorted(
            (row["bits_per_expert_weight"], row["held_out"]["perplexity"])
            for row in rows
            if row["name"].startswith(kind)
        )
        axes.plot(*zip(*points, strict=True), f"{marker}-", label=f"{kind}, calibrated")
    if arguments.recovered is not None:
        recovered = json.loads(arguments.recovered.read_text())["rows"]
        points = [(r["bits_per_expert_weight"], r["perplexity"]) for r in recovered if r.get("variant") == "light"]
        axes.plot(*zip(*points, strict=True), "*", markersize=9, label="calibrated, then light recovery")
    axes.axhline(original["held_out"]["perplexity"], color="0.3", linestyle=":", label="original, 16 bits")
    axes.set(
        xlabel="bits per expert weight, all metadata included",
        ylabel=f"perplexity of {result['model']}",
        yscale="log",
        xlim=(0, 5),
        ylim=(40, 500),
    )
    axes.set_yticks([40, 50, 60, 80, 100, 150, 200, 300, 500], labels=[40, 50, 60, 80, 100, 150, 200, 300, 500])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
