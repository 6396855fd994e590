"""What the benchmarks of sparse training share: tokens, batches, evaluation."""

from __future__ import annotations

import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compression"))
from loading import device_name

__all__ = ["batches_of", "device_name", "read_tokens", "score"]


def read_tokens(path: Path) -> np.ndarray:
    """Token ids from a .npy file, or one compressed by xz: (n,) integers."""
    if path.suffix == ".xz":
        with lzma.open(path) as file:
            return np.load(file, allow_pickle=False)
    return np.load(path, allow_pickle=False)


def batches_of(
    tokens: np.ndarray, window: int, batch: int, device: str, seed: int = 0
) -> Callable[[int], torch.Tensor]:
    """By step the ids (batch, window) int64 on the device: disjoint windows, epoch after epoch in random orders that
    depend on the seed and the epoch alone."""
    count = len(tokens) // window
    if count < batch:
        raise SystemExit(f"{len(tokens)} tokens are no batch of {batch} windows of {window}")
    windows = torch.from_numpy(tokens[: count * window].astype(np.int64)).view(count, window).to(device)
    per_epoch = count // batch

    def of_step(step: int) -> torch.Tensor:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        return windows[torch.from_numpy(order[at * batch : (at + 1) * batch]).to(device)]

    return of_step


def score(
    name: str, model: Any, tokens: np.ndarray, max_tokens: int, reference: Any = None, **more: Any
) -> dict[str, Any]:
    """One row: what a model predicts of held-out tokens, in float32."""
    quality = evaluate(model.float(), tokens, reference=reference, max_tokens=max_tokens).to_dict()
    row = {"name": name, **more, **quality}
    print(f"{name:32} {row['perplexity']:8.3f} {more.get('train_seconds', 0):.0f} s", flush=True)
    return row
