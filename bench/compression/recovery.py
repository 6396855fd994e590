"""What recovery wins back: compressed models before and after it, against the original, in float32.

    python bench/compression/recovery.py --model novels-moe-28m --tokens test_tokens.npy --train train_tokens.npy \\
        --device cuda --json bench/results/recovery-novels-moe-28m.json

Starting points are compressed first (calibrated ones on some of the training tokens), then recovered on tokens that the
evaluation does not see. All rows are loaded like any user would, from the directories. `--jobs` starting points are
worked on at the same time, each in a process of its own, which keeps a large GPU busier with a small model. Finished
ones are kept in the JSON, with the original's row: run again with other `--starts` to add some, or the same to renew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import CalibrationSpec, Recipe, compress, load_model
from qmoe_core.evaluation import evaluate, evaluate_all
from qmoe_core.recovery import RecoverySpec, recover

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results
from loading import device_name, load_compressed

CLASSES = {
    "scales": ("scales",),
    "light": ("scales", "norms", "router"),
    "all": ("scales", "norms", "router", "attention", "embedding"),
}


RATE = "ternary gptq rate "  # and then the rate
RECIPES = {
    "int2 g64": Recipe.uniform("int2", 64),
    "ternary centroid": Recipe.uniform("ternary", method="ternary-centroid"),
    "int3 g128 gptq": Recipe.uniform("int3", 128, "gptq"),
    "int2 g64 gptq": Recipe.uniform("int2", 64, "gptq"),
}


def start(name: str) -> Recipe:
    """The recipe of a starting point: one of `RECIPES`, or calibrated ternary at the rate that ends its name."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.startswith(RATE):
        raise argparse.ArgumentTypeError(f"{name!r} is none of {[*RECIPES, RATE + 'NUMBER']}")
    rate = float(name.removeprefix(RATE))
    return Recipe.uniform("ternary", method="gptq", options={"rate": rate, "sweeps": 5})


def start_name(name: str) -> str:
    """For argparse: the name, if `start` knows it."""
    start(name)
    return name


def spec_of(variant: str, arguments: argparse.Namespace) -> RecoverySpec:
    """CLASSES[,setting=value...]: a setting of `RecoverySpec`, or a class and its learning rate."""
    classes, *settings = variant.split(",")
    options: dict[str, Any] = {"learning_rates": {}}
    for key, value in (setting.split("=") for setting in settings):
        if key in ("steps", "batch", "seed"):
            options[key] = int(value)
        elif key in ("mode", "dtype"):
            options[key] = value
        elif key in ("average", "clip", "warmup", "kl_temperature"):
            options[key] = float(value)
        else:
            options["learning_rates"][key] = float(value)
    defaults = {"steps": arguments.steps, "batch": arguments.batch, "dtype": arguments.dtype}
    return RecoverySpec(CLASSES[classes], **{**defaults, **options})


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one starting point: sizes and quality, before recovery and after each variant of it."""
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)
    train = np.load(arguments.train, mmap_mode="r", allow_pickle=False)[: arguments.train_tokens]
    calibration, device = None, "cpu"
    if "gptq" in name:
        calibration = CalibrationSpec(
            np.asarray(train, dtype=np.int64), max_tokens=arguments.calibration_tokens, drift=True,
            gate_weighted=name.startswith("ternary"),
        )  # fmt: skip
        device = arguments.device
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        began = time.monotonic()
        first = Path(scratch) / "start"
        report = compress(arguments.model, first, start(name), calibration=calibration, device=device)
        models = {name: load_compressed(first, arguments.device)}
        extra: dict[str, dict[str, Any]] = {name: {"seconds_made": time.monotonic() - began}}
        sizes = {name: (report.bits_per_parameter, report.expert_bits_per_weight)}
        for variant in arguments.variants:
            label = f"{name} + {variant}"
            began = time.monotonic()
            result = recover(
                arguments.model, first, Path(scratch) / f"{len(models)}", train, spec_of(variant, arguments),
                device=arguments.device,
            )  # fmt: skip
            extra[label] = {"start": name, "variant": variant, "steps": result.steps}
            extra[label] |= {"validation": [result.initial, result.final], "tuned": result.tuned}
            extra[label]["seconds_made"] = time.monotonic() - began
            sizes[label] = (result.bits_per_parameter, result.expert_bits_per_weight)
            models[label] = load_compressed(Path(result.output), arguments.device)
    reference = load_model(arguments.model, dtype=torch.float32, device=arguments.device)
    scores = evaluate_all(
        models, tokens, reference=reference, window=arguments.window, max_tokens=arguments.max_tokens
    )  # fmt: skip
    rows = []
    for label, score in scores.items():
        row = {"name": label, "bits_per_parameter": sizes[label][0], "bits_per_expert_weight": sizes[label][1]}
        row |= {**score.to_dict(), **extra[label]}
        rows.append(row)
        print(
            f"{label:60} ppl {row['perplexity']:8.3f} kl {row['kl']:.4f} expert bits {sizes[label][1]:.4f}"
            f" all {sizes[label][0]:.4f} validation {row.get('validation')} {row['seconds_made']:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def original(arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of the original model."""
    model = load_model(arguments.model, dtype=torch.float32, device=arguments.device)
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)
    score = evaluate(model, tokens, window=arguments.window, max_tokens=arguments.max_tokens)
    return {"name": "original", "bits_per_expert_weight": 16.0, **score.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of token ids to evaluate on")
    parser.add_argument("--train", type=Path, required=True, help=".npy file of token ids to calibrate and recover on")
    parser.add_argument("--train-tokens", type=int, default=4 << 20)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--starts", nargs="*", default=list(RECIPES), type=start_name)
    parser.add_argument("--variants", nargs="*", default=["light", "all"], help="CLASSES[,setting=value...]")
    parser.add_argument("--jobs", type=int, default=1, help="starting points at the same time")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--scratch", type=Path, help="where the models go for as long as this runs")
    arguments = parser.parse_args()
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)[: arguments.max_tokens]
    finished = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else [original(arguments)]
    # Each in a fresh process even one after the other: a GPU's memory is then free for the next one.
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for rows in pool.imap(partial(measure, arguments=arguments), arguments.starts):
            name = rows[0]["name"]
            finished = [row for row in finished if name not in (row["name"], row.get("start"))] + rows
            write_results(
                arguments.json, "recovery", finished, device_name(arguments.device), model=arguments.model.name,
                train_tokens=arguments.train_tokens, calibration_tokens=arguments.calibration_tokens,
                batch=arguments.batch, dtype=arguments.dtype, torch=torch.__version__,
                tokens_sha256=hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
            )  # fmt: skip


if __name__ == "__main__":
    main()
