"""Gradual pruning of experts with and without SquareHead distillation, on a GPU: perplexity at equal steps.

    python bench/gpu/squarehead.py --model novels-moe-28m --train train_tokens.npy.xz --tokens test_tokens.npy \\
        --output bench/results/squarehead-novels-moe-28m.json

Every row trains all weights of the original with the same batches, the same cubic schedule to `--sparsity` and the same
optimizer; only the loss differs. The teacher is the original. `--device cpu` and smaller numbers try it out.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import batches_of, device_name, read_tokens, score

from qmoe_core import load_model
from qmoe_core.sparsify import Cubic, Distiller, Sparsifier

from common import write_results  # isort: skip  # training.py has made its folder known

LOSSES: dict[str, dict[str, float]] = {
    "cross-entropy": {"ce": 1.0, "squarehead": 0.0},
    "cross-entropy + KL": {"ce": 1.0, "kl": 1.0, "squarehead": 0.0},
    "cross-entropy + SquareHead": {"ce": 1.0, "squarehead": 1.0},
    "cross-entropy + SquareHead + routers": {"ce": 1.0, "squarehead": 1.0, "router": 1.0},
}


def trained(
    original: Any, teacher: Any, train: np.ndarray, loss: str, arguments: argparse.Namespace
) -> tuple[Any, Any]:
    """A sparse copy of the model, and numbers of its training."""
    model = copy.deepcopy(original).to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), arguments.lr, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = Cubic.of(arguments.steps, every=max(1, min(100, arguments.steps // 40)))
    sparsifier = Sparsifier(model, arguments.pattern, arguments.sparsity, schedule=schedule).attach(optimizer)
    distiller = Distiller(model, teacher, **LOSSES[loss])
    batches = batches_of(train, arguments.window, arguments.batch, arguments.device)
    begin, losses = time.monotonic(), []
    for step in range(arguments.steps):
        warm = min(1.0, (step + 1) / arguments.warmup)
        for group in optimizer.param_groups:  # down to zero, as published
            group["lr"] = arguments.lr * warm * (1 - step / arguments.steps)
        ids = batches(step)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            found = distiller({"input_ids": ids, "labels": ids})
        found.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, arguments.steps // 10) == 0:
            losses.append({name: part.item() for name, part in found.parts.items()})
            if not all(map(math.isfinite, losses[-1].values())):
                raise SystemExit(f"{loss}: diverged in step {step}: {losses[-1]}")
            print(f"  {step + 1} of {arguments.steps}: {losses[-1]}", flush=True)
    masks = sparsifier.finish()
    return model.eval(), {"train_seconds": time.monotonic() - begin, "sparsity": masks.sparsity(), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="token ids to train on: .npy or .npy.xz")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of held-out token ids")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="windows")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--losses", nargs="*", choices=[*LOSSES], default=[*LOSSES])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    train, tokens = read_tokens(arguments.train), read_tokens(arguments.tokens)
    original = load_model(arguments.model, dtype=torch.float32)
    teacher = copy.deepcopy(original).to(arguments.device)
    rows = [score("original", teacher, tokens, arguments.max_tokens)]
    for loss in arguments.losses:
        model, numbers = trained(original, teacher, train, loss, arguments)
        rows.append(score(loss, model, tokens, arguments.max_tokens, teacher, **numbers))
        write_results(
            arguments.output, "squarehead", rows, device_name(arguments.device), model=arguments.model.name,
            torch=torch.__version__, steps=arguments.steps, batch=arguments.batch, window=arguments.window,
            lr=arguments.lr, dtype=arguments.dtype, pattern=arguments.pattern,
        )  # fmt: skip


if __name__ == "__main__":
    main()
