"""Learned 2:4 masks against one-shot ones, on a GPU: perplexity with the same weights, but for updates by SparseGPT and
ALPS.

    python bench/gpu/maskllm.py --model novels-moe-28m --train train_tokens.npy.xz --tokens test_tokens.npy \\
        --output bench/results/maskllm-novels-moe-28m.json

Rows: the original; one-shot methods by `prune` (calibrated on the first training tokens); masks learned from some of
theirs as a prior, and without a prior. Weights are those of the original while masks are learned. `--device cpu` and
smaller numbers try it out.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import batches_of, device_name, read_tokens, score

from qmoe_core import CalibrationSpec, load_model
from qmoe_core.sparsify import MaskLearner, Masks, prune

from common import write_results  # isort: skip  # training.py has made its folder known

ONE_SHOT = ("magnitude", "wanda", "sparsegpt", "alps")


def learned(
    original: Any, train: np.ndarray, prior: Masks | None, arguments: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """A copy of the model with a learned mask, and numbers of its training."""
    model = copy.deepcopy(original).to(arguments.device).train()
    batches = batches_of(train, arguments.window, arguments.batch, arguments.device)
    learner = MaskLearner(model, arguments.pattern, prior, alpha=arguments.alpha, kappa=tuple(arguments.kappa))
    begin = time.monotonic()
    losses = learner.train(
        batches, arguments.steps, lr=arguments.lr, dtype=arguments.dtype, progress=progress(arguments.steps)
    )
    masks, seconds = learner.finish(), time.monotonic() - begin
    masks.check()
    agreement = {} if prior is None else {"agreement_with_prior": _agreement(masks, prior)}
    last = max(1, len(losses) // 20)
    numbers = {"train_seconds": seconds, "first_loss": losses[0], "last_loss": float(np.mean(losses[-last:]))}
    return model.eval(), numbers | agreement


def _agreement(a: Masks, b: Masks) -> float:
    same = sum(int((a[name].cpu() == b[name].cpu()).sum()) for name in a)
    return same / sum(mask.numel() for mask in a.values())


def progress(steps: int) -> Any:
    def tell(done: int, loss: float) -> None:
        if done % max(1, steps // 10) == 0:
            print(f"  {done} of {steps}: {loss:.3f}", flush=True)

    return tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="token ids to learn on: .npy or .npy.xz")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of held-out token ids")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="windows")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--alpha", type=float, default=3.0)
    parser.add_argument("--kappa", type=float, nargs=2, default=(1e2, 5e2))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--priors", nargs="*", choices=[*ONE_SHOT, "none"], default=["sparsegpt", "alps", "none"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    train, tokens = read_tokens(arguments.train), read_tokens(arguments.tokens)
    original = load_model(arguments.model, dtype=torch.float32)
    reference = copy.deepcopy(original).to(arguments.device)
    rows = [score("original", reference, tokens, arguments.max_tokens)]
    masks: dict[str, Masks] = {}

    def add(name: str, model: Any, **more: Any) -> None:
        model = model.to(arguments.device)
        rows.append(score(name, model, tokens, arguments.max_tokens, reference, pattern=arguments.pattern, **more))
        write_results(
            arguments.output, "maskllm", rows, device_name(arguments.device), model=arguments.model.name,
            torch=torch.__version__, steps=arguments.steps, batch=arguments.batch, window=arguments.window,
            lr=arguments.lr, dtype=arguments.dtype, calibration_tokens=arguments.calibration_tokens,
        )  # fmt: skip

    for method in ONE_SHOT:
        model, begin = copy.deepcopy(original), time.monotonic()
        data = None
        if method != "magnitude":
            data = CalibrationSpec(train, max_tokens=arguments.calibration_tokens, seed=None)
        masks[method] = prune(
            model, data, method, pattern=arguments.pattern, device=arguments.device if data else "cpu"
        )
        add(method, model, train_seconds=time.monotonic() - begin)
    for prior in arguments.priors:
        model, numbers = learned(original, train, masks.get(prior), arguments)
        add(f"learned, prior {prior}", model, **numbers)


if __name__ == "__main__":
    main()
