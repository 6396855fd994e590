"""The curve from half a bit to four and a half: what calibrated formats cost in quality, on the kind of text that the
model is for and on another.

    python bench/compression/calibrated.py --model novels-moe-28m --calibration calibration.txt \\
        --tokens test_tokens.npy --other wikitext2_test.txt --device cuda --jobs 6 \\
        --json bench/results/calibrated-novels-moe-28m.json

Every row compresses the model like any user would, and its size is what the bits are counted from. Finished rows are
kept in the JSON: run again with `--only` to add or renew some. `--jobs` rows are worked on at the same time.
Calibration sees `--calibration` only. The other text is never calibrated on; its perplexity says how far from home the
model is, KL and agreements what compression lost there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import CalibrationSpec, Recipe, compress, evaluate, load_model
from qmoe_core.evaluation import encode_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results
from loading import device_name, load_compressed


@dataclass(frozen=True)
class Row:
    """A recipe and how it is calibrated."""

    format: str
    group: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    half_step: bool | None = None
    zero_point: bool | None = None
    gate_weighted: bool = False
    tokens: int = 131072

    def recipe(self) -> Recipe:
        return Recipe.uniform(
            self.format, self.group, "gptq", options=self.options, half_step=self.half_step, zero_point=self.zero_point
        )


def ternary(rate: float) -> Row:
    return Row("ternary", options={"rate": rate, "sweeps": 5}, gate_weighted=True, tokens=262144)


ROWS = {
    "int4 g128": Row("int4", 128),
    "int3 g128": Row("int3", 128),
    "int2 g64": Row("int2", 64),
    "int2 g16": Row("int2", 16),
    "int2 g64 half, symmetric": Row("int2", 64, half_step=True, zero_point=False),
    **{f"ternary, rate {rate:g}": ternary(rate) for rate in (0.6, 1, 1.5, 2.2, 3)},
}


def texts_of(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Token ids to evaluate on."""
    return {
        "held_out": np.load(arguments.tokens, allow_pickle=False)[: arguments.max_tokens],
        "other": encode_text(arguments.model, arguments.other.read_text(encoding="utf-8"))[: arguments.max_tokens],
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: sizes and quality."""
    original = load_model(arguments.model, dtype=torch.float32, device=arguments.device)
    if name == "original":
        result: dict[str, Any] = {"name": name, "bits_per_expert_weight": 16.0}
        for text, tokens in texts_of(arguments).items():
            result[text] = evaluate(original, tokens, max_tokens=arguments.max_tokens).to_dict()
        return result
    row = ROWS[name]
    spec = CalibrationSpec(
        arguments.calibration, max_tokens=row.tokens, drift=True, gate_weighted=row.gate_weighted, seed=None
    )
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        started = time.monotonic()
        report = compress(
            arguments.model, Path(scratch) / "out", row.recipe(), calibration=spec, device=arguments.device
        )
        seconds = time.monotonic() - started
        model = load_compressed(Path(report.output), arguments.device)
    result = {
        "name": name,
        "bits_per_expert_weight": report.expert_bits_per_weight,
        "bits_per_parameter": report.bits_per_parameter,
        "bytes_on_disk": report.bytes_on_disk,
        "zero_fraction": float(np.mean([entry.zero_fraction for entry in report.tensors])),
        "calibration_tokens": row.tokens,
        "options": dict(row.options),
        "compress_seconds": seconds,
    }
    for text, tokens in texts_of(arguments).items():
        result[text] = evaluate(model, tokens, reference=original, max_tokens=arguments.max_tokens).to_dict()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of held-out token ids")
    parser.add_argument("--other", type=Path, required=True, help="held-out text of another kind")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--only", nargs="*", choices=("original", *ROWS), help="rows to measure")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scratch", type=Path, help="where the compressed models go for as long as this runs")
    arguments = parser.parse_args()
    finished = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    rows = {row["name"]: row for row in finished}
    wanted = arguments.only or [name for name in ("original", *ROWS) if name not in rows]
    # Each in a fresh process, also one after the other: a GPU's memory is then free for the next one.
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for row in pool.imap(partial(measure, arguments=arguments), wanted, chunksize=1):
            rows[row["name"]] = row
            ordered = [rows[name] for name in ("original", *ROWS) if name in rows]
            write_results(
                arguments.json, "calibrated", ordered, device_name(arguments.device), model=arguments.model.name,
                calibration=arguments.calibration.name, other=arguments.other.name, dtype="float32",
                torch=torch.__version__,
            )  # fmt: skip
            print(
                f"{row['name']:28} {row['bits_per_expert_weight']:6.3f} bits {row['held_out']['perplexity']:8.3f} "
                f"{row['other']['perplexity']:8.3f} {row.get('compress_seconds', 0):.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
