"""What whole experts cost: a quarter and half of them taken out, by each score.

    python bench/compression/pruning_experts.py --model novels-moe-28m --calibration calibration.txt \\
        --tokens test_tokens.npy --json bench/results/pruning-experts-novels-moe-28m.json

The model streams by once per row, as it does for any user; every row evaluates the checkpoint that comes out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from qmoe_core import CalibrationSpec, evaluate, load_model
from qmoe_core.sparsify import prune_experts
from qmoe_core.sparsify.saliency import SCORES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

SHARES = (0.75, 0.5)
TOKENS = 32768  # scores need fewer than weights do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text on which experts are watched")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of held-out token ids")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--scratch", type=Path, help="where the pruned models go for as long as this runs")
    arguments = parser.parse_args()
    tokens = np.load(arguments.tokens, allow_pickle=False)
    rows = []
    for share in SHARES:
        for score in SCORES:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                spec = CalibrationSpec(arguments.calibration, max_tokens=TOKENS, seed=None)
                report = prune_experts(arguments.model, Path(scratch) / "out", share, spec, score=score)
                model = load_model(Path(report.output), dtype=torch.float32)
                quality = evaluate(model, tokens, max_tokens=arguments.max_tokens)
            row = {
                "score": score,
                "keep": report.keep,
                "experts": report.experts,
                "parameters": report.parameters,
                "original_parameters": report.original_parameters,
                "calibration_tokens": report.calibration["tokens"],
                "seconds": report.seconds,
                **quality.to_dict(),
            }
            rows.append(row)
            write_results(
                arguments.json, "pruning-experts", rows, model=arguments.model.name,
                calibration=arguments.calibration.name, dtype="float32", torch=torch.__version__,
            )  # fmt: skip
            print(
                f"{report.keep} of {report.experts} {score:10} {row['perplexity']:8.3f} {report.seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
