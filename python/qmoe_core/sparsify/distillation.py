"""SquareHead: losses of a sparse student against its dense teacher (Kurtic et al., arXiv 2310.06927).

loss = ce * CE + kl * KL + squarehead * sum_l MSE(f_s^l, f_t^l) / (MSE(f_t^l, 0) + eps) + router * KL of the routers

CE          next-token cross-entropy with `labels`, mean over the predicted tokens
KL          KL(teacher || student) of next-token predictions at temperature T, times T^2, mean over the predicted tokens
f^l         what the l-th layer makes, l from 1: the embeddings do not count, and the last one has gone through the
            model's final norm, as transformers gives it; means are over tokens that are no padding and over dimensions
eps         that of bfloat16, 0.0078125: as published
routers     KL(teacher || student) of every router's distribution over experts, mean over routers and tokens: not part
            of the publication, which has no experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import QmoeError

EPSILON = torch.finfo(torch.bfloat16).eps
IGNORED = -100  # a label that is not to be predicted


@dataclass(frozen=True)
class DistillationLoss:
    """One batch's loss.

    Attributes:
        total: weighted sum, to call `backward` on. parts: by name, unweighted and detached: "ce", "kl", "squarehead",
            "router", those with a weight. student: what the student returned.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    student: Any


class Distiller:
    """Makes the loss of a student on a batch, from what its teacher makes of the same batch.

    For models of transformers that are decoders. Masks are kept by a `Sparsifier` on the optimizer, or stay as they are
    by one with a `Constant` schedule.

    Attributes:
        teacher: in evaluation mode, without gradients.

    Example:
        >>> import copy, torch
        >>> from transformers import AutoModelForCausalLM
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import Distiller, Sparsifier
        >>> teacher = AutoModelForCausalLM.from_pretrained(example_directory(), dtype=torch.float32)
        >>> student = copy.deepcopy(teacher).train()
        >>> optimizer = torch.optim.AdamW(student.parameters(), 3e-5)
        >>> sparsifier = Sparsifier(student, "2:4").attach(optimizer)
        >>> ids = torch.arange(128).view(2, 64)
        >>> loss = Distiller(student, teacher, router=0.1)({"input_ids": ids, "labels": ids})
        >>> loss.total.backward()
        >>> optimizer.step()
        >>> sorted(loss.parts)
        ['ce', 'router', 'squarehead']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        ce: float = 1.0,
        kl: float = 0.0,
        squarehead: float = 1.0,
        router: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        """The defaults are those of the published recipe for MPT on GSM8K. Raises `E_VALUE`."""
        self.weights = {"ce": ce, "kl": kl, "squarehead": squarehead, "router": router}
        for name, weight in self.weights.items():
            if weight < 0:
                raise QmoeError("E_VALUE", f"the weight of '{name}' is negative", actual=weight)
        if not any(self.weights.values()):
            raise QmoeError("E_VALUE", "a loss needs a part with a weight", actual=self.weights)
        if temperature <= 0:
            raise QmoeError("E_VALUE", "the temperature must be positive", actual=temperature)
        self.student, self.temperature = student, temperature
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, batch: Mapping[str, torch.Tensor], student: nn.Module | None = None) -> DistillationLoss:
        """
        Args:
            batch: what the models take: `input_ids` (B, L), perhaps `attention_mask` (B, L), and for ce and kl `labels`
                (B, L), -100 where a token is not to be predicted.
            student: the student as a wrapper has it (DistributedDataParallel); None for itself.

        Raises:
            QmoeError: `E_MISSING` (no labels), `E_LAYOUT` (a model that gives no hidden states or router logits),
                `E_SHAPE` (models that do not go together).
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        wanted = {"output_hidden_states": True} if self.weights["squarehead"] else {}
        wanted |= {"output_router_logits": True} if self.weights["router"] else {}
        found = (self.student if student is None else student)(**inputs, **wanted, use_cache=False)
        expected = None
        if any(self.weights[name] for name in ("kl", "squarehead", "router")):
            with torch.no_grad():
                expected = self.teacher(**inputs, **wanted, use_cache=False)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        makers = {"ce": self._ce, "kl": self._kl, "squarehead": self._squarehead, "router": self._router}
        parts = {name: makers[name](batch, found, expected, real) for name, weight in self.weights.items() if weight}
        total = sum((self.weights[name] * part for name, part in parts.items()), torch.zeros((), device=real.device))
        return DistillationLoss(total, {name: part.detach() for name, part in parts.items()}, found)

    # Parts: of a batch, the student's and the teacher's outputs, and which tokens are no padding (B, L).

    def _ce(self, batch: Mapping[str, torch.Tensor], found: Any, _: Any, __: torch.Tensor) -> torch.Tensor:
        labels = _labels(batch)
        return F.cross_entropy(found.logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def _kl(self, batch: Mapping[str, torch.Tensor], found: Any, expected: Any, _: torch.Tensor) -> torch.Tensor:
        chosen = _labels(batch) != IGNORED
        _same(found.logits, expected.logits, "logits")
        a, b = (output.logits[:, :-1][chosen].float() / self.temperature for output in (found, expected))
        return _divergence(a, b).mean() * self.temperature**2

    def _squarehead(self, _: Any, found: Any, expected: Any, real: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=real.device)
        pairs = list(zip(*(_required(output, "hidden_states") for output in (found, expected)), strict=False))
        if len(found.hidden_states) != len(expected.hidden_states):
            raise QmoeError("E_SHAPE", "student and teacher have another number of layers",
                            expected=len(expected.hidden_states), actual=len(found.hidden_states))  # fmt: skip
        for mine, theirs in pairs[1:]:
            _same(mine, theirs, "hidden states")
            a, b = mine[real].float(), theirs[real].float()
            total = total + (a - b).square().mean() / (b.square().mean() + EPSILON)
        return total

    def _router(self, _: Any, found: Any, expected: Any, real: torch.Tensor) -> torch.Tensor:
        divergences = []
        for mine, theirs in zip(*(_required(output, "router_logits") for output in (found, expected)), strict=True):
            _same(mine, theirs, "router logits")
            a, b = (logits.reshape(*real.shape, -1)[real].float() for logits in (mine, theirs))
            divergences.append(_divergence(a, b).mean())
        return torch.stack(divergences).mean()


def _labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the token at each place but the last is to predict: (B, L - 1)."""
    if "labels" not in batch:
        raise QmoeError("E_MISSING", "cross-entropy and KL need labels", expected="labels", actual=sorted(batch))
    return batch["labels"][:, 1:]


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits (n, C): (n,)."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _required(output: Any, name: str) -> Any:
    value = getattr(output, name, None)
    if not value:
        raise QmoeError("E_LAYOUT", f"the model gives no {name}", actual=type(output).__name__)
    return value


def _same(student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise QmoeError("E_SHAPE", f"student and teacher differ in the shape of their {what}",
                        expected=tuple(teacher.shape), actual=tuple(student.shape))  # fmt: skip


def trainer_class(distiller: Distiller, base: type | None = None) -> type:
    """A subclass of transformers' Trainer (or of `base`, a subclass of it) whose loss is the distiller's. Parts are
    logged as "loss_ce" and so on. Give its instance the student as `model`.

    Raises:
        QmoeError: `E_MISSING` where transformers finds no accelerate.
    """
    if base is None:
        try:
            from transformers import Trainer
        except ImportError as error:
            raise QmoeError("E_MISSING", "transformers' Trainer needs accelerate: pip install accelerate") from error
        base = Trainer

    class DistillationTrainer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.model_accepts_loss_kwargs = False  # losses are means: the trainer divides by the number of parts
            distiller.teacher.to(self.args.device)
            self._parts: dict[str, list[torch.Tensor]] = {}

        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = distiller(inputs, model)
            for name, part in loss.parts.items():
                self._parts.setdefault(f"loss_{name}", []).append(part)
            return (loss.total, loss.student) if return_outputs else loss.total

        def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
            if "loss" in logs:
                logs = {**logs, **{name: float(torch.stack(parts).mean()) for name, parts in self._parts.items()}}
                self._parts.clear()
            super().log(logs, *arguments, **named)

    return DistillationTrainer
