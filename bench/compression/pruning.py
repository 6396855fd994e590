"""What zeros in the experts cost: one-shot methods at 2:4, and at half and three quarters of the weights anywhere.

    python bench/compression/pruning.py --model novels-moe-28m --calibration calibration.txt --tokens test_tokens.npy \\
        --json bench/results/pruning-novels-moe-28m.json

Every row prunes the model like any user would, and evaluates the checkpoint that comes out. Finished rows are kept in
the JSON: run again with `--only` to renew some.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import CalibrationSpec, evaluate, load_model
from qmoe_core.sparsify import PruneSettings, prune_checkpoint
from qmoe_core.sparsify.methods import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

PATTERNS: dict[str, tuple[str, float | None]] = {
    "2:4": ("2:4", None),
    "50 %": ("unstructured", 0.5),
    "75 %": ("unstructured", 0.75),
}
COMPARED = ("magnitude", "wanda", "sparsegpt", "alps")
ROWS = {
    f"{pattern} {method}": PruneSettings(method, *settings)
    for pattern, settings in PATTERNS.items()
    for method in COMPARED
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: what was pruned and what it cost."""
    tokens = np.load(arguments.tokens, allow_pickle=False)
    original = load_model(arguments.model, dtype=torch.float32)
    if name == "original":
        return {"name": name, **evaluate(original, tokens, max_tokens=arguments.max_tokens).to_dict()}
    settings = ROWS[name]
    spec = None
    if METHODS[settings.method].needs_statistics:
        spec = CalibrationSpec(arguments.calibration, seed=None)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        report = prune_checkpoint(arguments.model, Path(scratch) / "out", settings, calibration=spec)
        model = load_model(Path(report.output), dtype=torch.float32)
        quality = evaluate(model, tokens, reference=original, max_tokens=arguments.max_tokens)
    return {
        "name": name,
        "method": settings.method,
        "pattern": settings.pattern,
        "sparsity": report.sparsity,
        "mask_bits_per_weight": report.mask_bits_per_weight,
        "calibration_tokens": 0 if report.calibration is None else report.calibration["tokens"],
        "prune_seconds": report.seconds,
        **quality.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of held-out token ids")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--only", nargs="*", choices=("original", *ROWS), help="rows to measure")
    parser.add_argument("--scratch", type=Path, help="where the pruned models go for as long as this runs")
    arguments = parser.parse_args()
    finished = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    rows = {row["name"]: row for row in finished}
    for name in arguments.only or [name for name in ("original", *ROWS) if name not in rows]:
        rows[name] = measure(name, arguments)
        ordered = [rows[name] for name in ("original", *ROWS) if name in rows]
        write_results(
            arguments.json, "pruning", ordered, model=arguments.model.name, calibration=arguments.calibration.name,
            dtype="float32", torch=torch.__version__,
        )  # fmt: skip
        print(f"{name:24} {rows[name]['perplexity']:8.3f} {rows[name].get('prune_seconds', 0):.0f} s", flush=True)


if __name__ == "__main__":
    main()
