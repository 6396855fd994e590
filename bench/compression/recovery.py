"""What recovery wins back: compressed models before and after it, against the original, in float32.

    python bench/compression/recovery.py --model novels-moe-28m --tokens test_tokens.npy --train train_tokens.npy \\
        --device cuda --steps 1000 --json bench/results/recovery-novels-moe-28m.json

Starting points are compressed first (calibrated ones on some of the training tokens), then recovered on tokens that the
evaluation does not see. All rows are loaded like any user would, from the directories.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import CalibrationSpec, Recipe, compress, load_model
from qmoe_core.evaluation import evaluate_all
from qmoe_core.recovery import RecoverySpec, recover
from qmoe_core.recovery.modules import make_tunable
from qmoe_core.recovery.writing import record_of
from qmoe_core.source import SourceCheckpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

CLASSES = {
    "scales": ("scales",),
    "light": ("scales", "norms", "router"),
    "all": ("scales", "norms", "router", "attention", "embedding"),
}


def starts() -> dict[str, Recipe]:
    """Row name -> recipe of the starting point."""
    rows = {
        "int2 g64": Recipe.uniform("int2", 64),
        "ternary centroid": Recipe.uniform("ternary", method="ternary-centroid"),
        "int3 g128 gptq": Recipe.uniform("int3", 128, "gptq"),
        "int2 g64 gptq": Recipe.uniform("int2", 64, "gptq"),
    }
    for rate in (0.05, 0.25, 0.3, 0.9, 1.0, 1.3, 1.4, 1.5, 1.6, 2.0):
        rows[f"ternary gptq rate {rate}"] = Recipe.uniform("ternary", method="gptq", options={"rate": rate})
    return rows


def _load(directory: Path, device: str) -> Any:
    """The compressed model in float32; on a GPU, where packed modules may lack kernels, with the same weights dense."""
    model = load_model(directory, dtype=torch.float32)
    if device != "cpu":
        with SourceCheckpoint(directory) as checkpoint:
            make_tunable(model, lambda name: record_of(checkpoint, name))
    return model.to(device)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: sizes and quality, before and after."""
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)
    train = np.load(arguments.train, mmap_mode="r", allow_pickle=False)[: arguments.train_tokens]
    original = load_model(arguments.model, dtype=torch.float32, device=arguments.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for index, name in enumerate(arguments.starts):
            recipe = starts()[name]
            calibration, device = None, "cpu"
            if "gptq" in name:
                ids = np.asarray(train, dtype=np.int64)
                calibration = CalibrationSpec(ids, max_tokens=arguments.calibration_tokens, drift=True)
                device = arguments.device
            began = time.monotonic()
            first = Path(scratch) / f"{index}"
            report = compress(arguments.model, first, recipe, calibration=calibration, device=device)
            models = {name: _load(first, arguments.device)}
            extra: dict[str, dict[str, Any]] = {name: {"seconds_made": time.monotonic() - began}}
            sizes = {name: (report.bits_per_parameter, report.expert_bits_per_weight)}
            for variant in arguments.variants:
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
                spec = RecoverySpec(CLASSES[classes], **{**defaults, **options})
                label = f"{name} + {variant}"
                began = time.monotonic()
                output = Path(scratch) / f"{index}-{len(models)}"
                result = recover(arguments.model, first, output, train, spec, device=arguments.device)
                extra[label] = {"validation": [result.initial, result.final], "tuned": result.tuned}
                extra[label]["seconds_made"] = time.monotonic() - began
                sizes[label] = (result.bits_per_parameter, result.expert_bits_per_weight)
                print(label, result.initial, result.final, extra[label]["seconds_made"], file=sys.stderr, flush=True)
                models[label] = _load(Path(result.output), arguments.device)
            for label, score in evaluate_all(
                models, tokens, reference=original, window=arguments.window, max_tokens=arguments.max_tokens
            ).items():
                bits, expert_bits = sizes[label]
                rows.append(
                    {
                        "name": label, "bits_per_parameter": bits, "bits_per_expert_weight": expert_bits,
                        **score.to_dict(), **extra[label],
                    }
                )  # fmt: skip
                row = rows[-1]
                print(
                    f"{label:60} ppl {row['perplexity']:8.3f} kl {row['kl']:.4f} expert bits {expert_bits:.4f}"
                    f" all {bits:.4f} validation {row.get('validation')} {row['seconds_made']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of token ids to evaluate on")
    parser.add_argument("--train", type=Path, required=True, help=".npy file of token ids to calibrate and recover on")
    parser.add_argument("--train-tokens", type=int, default=4 << 20)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--starts", nargs="*", default=["int2 g64", "ternary centroid"], choices=list(starts()))
    parser.add_argument("--variants", nargs="*", default=["light", "all"], help="CLASSES[,setting=value...]")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--scratch", type=Path, help="where the models go for as long as this runs")
    arguments = parser.parse_args()
    rows = measure(arguments)
    used = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)[: rows[0]["windows"] * rows[0]["window"]]
    write_results(
        arguments.json,
        "recovery",
        rows,
        model=arguments.model.name,
        tokens_sha256=hashlib.sha256(np.ascontiguousarray(used).tobytes()).hexdigest(),
        recovery_device=torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
