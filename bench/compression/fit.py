"""Mixed formats within a budget against one format for all experts.

    python bench/compression/fit.py --model novels-moe-28m --tokens test_tokens.npy --calibration calibration.txt \\
        --json bench/results/fit-novels-moe-28m.json

Losses of candidate formats are measured on calibration text, budgets are solved, and the mixed models are evaluated on
other text beside uniform ones: as `qmoe compress --fit --calibration` does it, or with `--method data-free` with
formats that need no calibration, each of them measured on every expert tensor alone. `predicted_kl` is the sum of the
single losses, so the rows also show how well they add up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import Recipe, compress, load_model
from qmoe_core.allocation import (
    CALIBRATED,
    DATA_FREE,
    CompressedTrials,
    frontier,
    measure_sensitivity,
    plan_recipe,
    solve,
    streamed_losses,
)
from qmoe_core.allocation.fit import short_name
from qmoe_core.allocation.streamed import TOKENS
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.evaluation import encode_text, evaluate_all
from qmoe_core.generation import load_tokenizer
from qmoe_core.quickstart import original_sizes
from qmoe_core.recipe import Rule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

UNIFORM: tuple[dict[str, Any], ...] = (
    *({"format": "ternary", "method": "gptq", "options": {"rate": rate}} for rate in (2.5, 0.5)),
    *(
        {"format": "int2", "group": group, "method": "gptq", "zero_point": False, "half_step": True}
        for group in (0, 64, 32, 16)
    ),
    *({"format": "int3", "group": group, "method": "gptq"} for group in (0, 128)),
)


def sizes(report: Any) -> dict[str, Any]:
    return {
        "bits_per_parameter": report.bits_per_parameter,
        "bits_per_expert_weight": report.expert_bits_per_weight,
        "bytes_on_disk": report.bytes_on_disk,
    }


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def progress(event: Any) -> None:
    log(f"{event.done} of {event.total} {event.detail}")


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, everything else of the results)."""
    gptq = arguments.method == "gptq"
    candidates = UNIFORM if gptq else DATA_FREE
    ids = encode_text(load_tokenizer(arguments.model), arguments.calibration.read_text(encoding="utf-8"))
    calibration = CalibrationSpec(ids, window=arguments.window, max_tokens=arguments.calibration_tokens)

    def packed(name: str, recipe: Recipe) -> Any:
        log(f"compress: {name}")
        out = scratch / name.replace(" ", "-")
        return compress(arguments.model, out, recipe, calibration=calibration if recipe.calibrated else None)

    reports = {short_name(entry): packed(short_name(entry), Recipe((Rule.make(**entry),))) for entry in candidates}
    log("sensitivity")
    if gptq:  # what `qmoe compress --fit --calibration` does; the uniform formats for comparison only
        tried = (*candidates, *CALIBRATED)
        everything = streamed_losses(arguments.model, calibration, tried, progress=progress)
        items = [replace(item, candidates=item.candidates[len(candidates) :]) for item in everything]
    else:
        items = everything = measure_sensitivity(
            arguments.model, ids, candidates, window=arguments.window, max_tokens=arguments.sensitivity_tokens,
            trial=CompressedTrials([report.output for report in reports.values()]), progress=progress,
        )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, report) in enumerate(reports.items()):
        rows[name] = {"kind": "uniform", **sizes(report)}
        rows[name]["predicted_kl"] = sum(item.candidates[number].loss for item in everything)
    weights = sum(item.weights for item in items)
    for bits in arguments.bits:
        started = time.perf_counter()
        allocation = solve(items, int(bits * weights / 8))
        seconds = time.perf_counter() - started
        name = f"fit {bits:g}"
        reports[name] = report = packed(name, plan_recipe(items, allocation))
        chosen = zip(items, allocation.choice, strict=True)
        rows[name] = {
            "kind": "fit", **sizes(report), "budget_bits": bits, "predicted_kl": allocation.loss,
            "bound": allocation.bound, "optimal": allocation.optimal, "solver_seconds": seconds,
            "choice": {item.name: short_name(dict(item.candidates[number].settings)) for item, number in chosen},
        }  # fmt: skip
    log("evaluate")
    original = load_model(arguments.model, dtype=torch.float32)
    models = {"original": original}
    models |= {name: load_model(report.output, dtype=torch.float32) for name, report in reports.items()}
    rows = {"original": {"kind": "original", **original_sizes(arguments.model)}, **rows}
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)
    results = evaluate_all(
        models, tokens, reference=original, window=arguments.window, max_tokens=arguments.max_tokens,
        progress=lambda event: log(f"{event.done} of {event.total} windows") if event.done % 128 == 0 else None,
    )  # fmt: skip
    points = [[point.nbytes * 8 / weights, point.loss] for point in frontier(items, 60)]
    extra: dict[str, Any] = {"frontier_bits_and_kl": points, "sensitivity_tokens": arguments.sensitivity_tokens}
    if gptq:
        extra["calibration_tokens"] = arguments.calibration_tokens
        extra["sensitivity_tokens"] = min(TOKENS, arguments.calibration_tokens)
    return [{"name": name, **rows[name], **result.to_dict()} for name, result in results.items()], extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of token ids to evaluate on")
    parser.add_argument("--calibration", type=Path, required=True, help="text to measure sensitivities on")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--method", choices=("data-free", "gptq"), default="gptq", help="what makes the candidates")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 2.5, 3.0], help="per expert weight")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--sensitivity-tokens", type=int, default=4096, help="data-free only")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, extra = run(arguments, Path(scratch))
    write_results(
        arguments.json, "fit", rows, model=arguments.model.name, method=arguments.method, dtype="float32",
        threads=torch.get_num_threads(), torch=torch.__version__, **extra,
    )  # fmt: skip
    for row in rows:
        print(f"{row['name']:28} {row['perplexity']:9.3f} {row['bits_per_expert_weight']:7.3f} bits", file=sys.stderr)


if __name__ == "__main__":
    main()
