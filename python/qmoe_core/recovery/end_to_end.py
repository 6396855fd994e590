"""Matching the original model's predictions: knowledge distillation (Hinton et al., arXiv 1503.02531) with nothing but
the compressed model's continuous parameters to tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..progress import ProgressEvent
from .spec import RecoverySpec
from .training import State, Trainer, arithmetic
from .tunables import Tunables, Values


def predict(call: Callable[..., Any], model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, P, V) for a batch of windows (B, window); for encoder-decoder models the second half's."""
    if getattr(model.config, "is_encoder_decoder", False):
        half = ids.shape[1] // 2
        decoder_ids = model.prepare_decoder_input_ids_from_labels(ids[:, half:].contiguous())
        return call(input_ids=ids[:, :half], decoder_input_ids=decoder_ids, use_cache=False).logits
    return call(input_ids=ids, use_cache=False).logits


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over positions of KL(teacher || student) of the softened predictions, times the squared temperature, which
    keeps the size of the gradient. Logits (..., V) -> () float32."""
    expected = torch.log_softmax(teacher.float() / temperature, -1)
    actual = torch.log_softmax(student.float() / temperature, -1)
    return (expected.exp() * (expected - actual)).sum(-1).mean() * temperature**2


class EndToEnd:
    """One run: `teacher` and `student` are in memory on `device`, windows (n, window) int64 on the host."""

    def __init__(
        self, teacher: Any, tunables: Tunables, windows: torch.Tensor, spec: RecoverySpec, device: str
    ) -> None:
        self.teacher, self.tunables, self.spec, self.device = teacher, tunables, spec, device
        self.student = tunables.model
        self.train, self.held_out = windows[: -spec.validation], windows[-spec.validation :]

    def _loss(self, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        ids = ids.to(self.device)
        with arithmetic(self.device, self.spec.dtype):
            with torch.no_grad():
                expected = predict(self.teacher, self.teacher, ids)
            actual = predict(self.tunables.call, self.student, ids)
        return divergence(expected, actual, temperature)

    @torch.no_grad()
    def measure(self) -> float:
        """Mean divergence on the validation windows, at temperature 1."""
        sums = [
            float(self._loss(ids, 1.0)) * len(ids)
            for ids in self.held_out.split(min(self.spec.batch, len(self.held_out)))
        ]
        return sum(sums) / len(self.held_out)

    def run(
        self,
        state: State | None,
        save: Callable[[State], None],
        progress: Callable[[ProgressEvent], None] | None,
    ) -> tuple[float, float, list[float], Values]:
        """Loss before and after, losses of the steps, and what was found."""
        spec, trainer = self.spec, Trainer(self.tunables, self.spec)  # the untuned parameters: measure them first
        if state is None:
            initial = self.measure()
        else:
            initial = float(state["initial"])
            trainer = Trainer(self.tunables, spec, state)
        before = torch.tensor(initial, dtype=torch.float64)

        def after(trainer: Trainer) -> None:
            if trainer.step % spec.checkpoint_every == 0:
                save({**trainer.state(), "initial": before})
            if progress is not None:
                progress(ProgressEvent("recover", trainer.step, spec.steps, "steps"))

        def loss(numbers: np.ndarray) -> torch.Tensor:
            return self._loss(self.train[torch.from_numpy(numbers)], spec.kl_temperature)

        trainer.run(loss, len(self.train), "", after)
        trainer.finish()
        return initial, self.measure(), trainer.losses, self.tunables.values()
