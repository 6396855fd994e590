"""The loop that trains a `MaskLearner`: one process or several, resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import QmoeError

if TYPE_CHECKING:
    from .maskllm import MaskLearner

BETAS, EPSILON, LAST = (0.9, 0.95), 1e-5, 0.1  # of AdamW, and the last learning rate's share, as in the published code


def language_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of a decoder of transformers on ids (B, L)."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def train_masks(
    learner: MaskLearner,
    batches: Callable[[int], torch.Tensor],
    steps: int,
    *,
    lr: float,
    weight_decay: float,
    clip: float,
    dtype: str,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None,
    state: Path | None,
    every: int,
    progress: Callable[[int, float], None] | None,
) -> list[float]:
    """AdamW on the logits, the learning rate along a cosine to a tenth.

    In a process group of torch.distributed, or under torchrun, whose processes it then brings together, every process
    takes its part of each batch's rows and samples masks of its own; gradients are means over all rows, so all
    processes have the same logits throughout.

    Args:
        batches: the whole batch of a step, of token ids (B, L), or whatever `loss` takes with rows in front.
        lr, weight_decay, clip: of AdamW, and the largest norm of all gradients (0: any).
        dtype: "bfloat16" computes the model under autocast.
        loss: of the model on some rows; None: `language_loss`.
        state: a file for what continuing needs, written every `every` steps and in the end; if it is there, it is
            continued, to the same bits. All processes must see it.
        progress: called with the steps done and the last loss.

    Returns:
        The model's loss of every step, of this process's rows.

    Raises:
        QmoeError: `E_VALUE` (dtype, fewer rows than processes, a loss that is not finite), `E_CHANGED` (a state of
            other settings), `E_CHECKSUM`, `E_IO`.
    """
    if dtype not in ("float32", "bfloat16"):
        raise QmoeError("E_VALUE", "masks are trained in", expected=("float32", "bfloat16"), actual=dtype)
    of, parameters = loss or language_loss, list(learner.parameters())
    settings = torch.tensor([steps, lr, weight_decay, clip], dtype=torch.float64)
    optimizer = torch.optim.AdamW(parameters, lr, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    with _together(parameters[0].device):
        losses = _load(learner, optimizer, state, settings)
        rank, size = place()
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / steps)))
            learner.step(step, steps)
            batch = batches(step)
            if len(batch) < size:
                raise QmoeError("E_VALUE", "a batch has fewer rows than there are processes", expected=f">= {size}",
                                actual=len(batch))  # fmt: skip
            rows = batch[rank::size]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                value = of(learner.model, rows)
            share = len(rows) * size / len(batch)
            (value * share + learner.regulariser()).backward()  # type: ignore[no-untyped-call]
            _average([parameter.grad for parameter in parameters], size)
            norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
            losses.append(value.item())
            if not (math.isfinite(losses[-1]) and math.isfinite(norm.item())):
                raise QmoeError("E_VALUE", f"the masks' training diverged in step {step}", expected="finite",
                                actual=f"loss {losses[-1]}, gradient {norm.item()}")  # fmt: skip
            optimizer.step()
            if state is not None and rank == 0 and ((step + 1) % every == 0 or step + 1 == steps):
                _save(learner, optimizer, state, settings, losses)
            if progress is not None:
                progress(step + 1, losses[-1])
    return losses


@contextmanager
def _together(device: torch.device) -> Iterator[None]:
    """All processes that torchrun has started are one group in the block."""
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _average(gradients: list[Any], size: int) -> None:
    """The mean over all processes, in place."""
    import torch.distributed as dist

    for gradient in gradients if size > 1 else []:
        dist.all_reduce(gradient)
        gradient /= size


def _save(
    learner: MaskLearner, optimizer: torch.optim.Optimizer, path: Path, settings: torch.Tensor, losses: list[float]
) -> None:
    from ..recovery.training import save_state

    state = {"settings": settings, "losses": torch.tensor(losses, dtype=torch.float64)}
    for name, logits in learner.logits.items():
        state[f"logits/{name}"] = logits.detach()
        for key, value in optimizer.state[logits].items():
            state[f"{key}/{name}"] = value
    save_state(path, state)


def _load(
    learner: MaskLearner, optimizer: torch.optim.Optimizer, path: Path | None, settings: torch.Tensor
) -> list[float]:
    """Continues from a state, if there is one: the losses so far."""
    from ..recovery.training import load_state

    state = None if path is None else load_state(path)
    if state is None:
        return []
    if not torch.equal(state["settings"], settings):
        raise QmoeError("E_CHANGED", "the state is of a training with other settings", file=path,
                        expected=settings.tolist(), actual=state["settings"].tolist())  # fmt: skip
    learner.load_state_dict({key.removeprefix("logits/"): v for key, v in state.items() if key.startswith("logits/")})
    for name, logits in learner.logits.items():
        optimizer.state[logits] = {
            "step": state[f"step/{name}"],
            "exp_avg": state[f"exp_avg/{name}"].to(logits.device),
            "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(logits.device),
        }
    losses: list[float] = state["losses"].tolist()
    return losses
