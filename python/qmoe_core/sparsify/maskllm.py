"""MaskLLM: masks that are learned while the weights stay (Fang et al., arXiv 2409.17481), for models of any kind.

Each group of m weights has a logit for every mask with n of m: 6 for 2:4. Training samples soft masks,

    y = softmax((kappa pi + g) / tau),  g = -log(-log u),  mask = sum_c y_c S_c

and multiplies the frozen weights by them; the loss, less reg * ||W * mask||^2, trains the logits pi alone. kappa rises
and tau falls on the way, until nearly one mask is left, the one with the largest logit. Logits begin at a normal
distribution of width sigma, moved towards a prior mask M by sigma alpha (M . S_c - n / 2): that of a one-shot method,
or, to go from a general mask to one of a domain, the mask that was learned on general text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import QmoeError
from ..store import crc32c
from .mask_training import place, train_masks
from .masks import Masks
from .patterns import NM, Pattern
from .selection import Weight, select_weights

MOST_CANDIDATES = 100  # of a group: each has a logit, and two numbers of the optimizer
TINY = 1e-20  # below any uniform number but zero


class MaskLearner:
    """Learns an n:m mask for a model's weights; everything else of the model is frozen until `finish`.

    While the model trains, modules that hold the weights see them masked: softly in training mode, with a new sample
    for every `step`; by the best masks in evaluation mode. Nothing in the model is renamed, and recomputation by
    gradient checkpointing sees the same sample. Logits are float32 whatever the weights are: (..., N, K / m, C) for a
    weight (..., N, K) and C masks per group.

    Run it with `train`, or in a loop of your own: `step(t, T)`, the model's loss + `regulariser()`, `backward`, and a
    step of an optimizer on `parameters()`.

    Attributes:
        weights: by name, what is masked. logits: by name, what is trained. kappa, tau, reg: as they are now.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import MaskLearner, prune
        >>> model = AutoModelForCausalLM.from_pretrained(example_directory(), dtype=torch.float32)
        >>> learner = MaskLearner(model.train(), "2:4")
        >>> text = torch.arange(512).view(8, 64)
        >>> losses = learner.train(lambda step: text[step % 4 :: 4], steps=4)
        >>> masks = learner.finish()
        >>> masks.sparsity(), len(losses)
        (0.5, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | NM = "2:4",
        prior: Masks | None = None,
        *,
        alpha: float = 3.0,
        kappa: tuple[float, float] = (1e2, 5e2),
        tau: tuple[float, float] = (4.0, 0.05),
        reg: float = 1e-5,
        sigma: float = 0.01,
        roles: Sequence[str] = ("expert",),
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """The defaults are the publication's.

        Args:
            pattern: n:m with at most 100 masks per group (4:8 has 70).
            prior: masks of the same pattern for all of the weights. alpha: how much they count.
            kappa, tau: first and last value of the scale of logits, and of the temperature.
            reg: what the energy of the weights that stay is worth at first; less and less, down to nothing in the end,
                as in the published code. It keeps gradients from vanishing.
            sigma: width of the logits at the start. roles, names: which weights (`select_weights`).

        Raises:
            QmoeError: `E_VALUE` (no n:m pattern, settings), `E_LIMIT` (too many masks per group), `E_MISSING` (no such
                weights, no prior for one), `E_SHAPE` (not divisible by m, a prior for another shape).
        """
        parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(parsed, NM):
            raise QmoeError("E_VALUE", "masks are learned for n:m patterns", expected="like 2:4", actual=str(parsed))
        for name, value in {"kappa": kappa, "tau": tau, "sigma": (sigma,)}.items():
            if min(value) <= 0:
                raise QmoeError("E_VALUE", f"'{name}' must be positive", actual=value)
        self.model, self.pattern = model, parsed
        self.weights = select_weights(model, roles, names)
        candidates = parsed.candidates()
        if len(candidates) > MOST_CANDIDATES:
            raise QmoeError("E_LIMIT", f"pattern '{parsed}' has {len(candidates)} masks per group",
                            expected=f"<= {MOST_CANDIDATES}")  # fmt: skip
        self._candidates = candidates.float()
        self._range = {"kappa": kappa, "tau": tau, "reg": (reg, 0.0)}
        self.kappa, self.tau, self.reg, self.seed = kappa[0], tau[0], reg, seed
        self._step, self._rank = 0, 0
        self.logits = {name: self._logits(weight, prior, alpha, sigma) for name, weight in self.weights.items()}
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._handles: list[Any] = []
        self._install()

    def _logits(self, weight: Weight, prior: Masks | None, alpha: float, sigma: float) -> nn.Parameter:
        try:
            self.pattern.check_shape(weight.shape)
        except QmoeError as error:
            raise error.locate(tensor=weight.name) from None
        *outer, columns = weight.shape
        device = weight.parameter.device
        generator = torch.Generator().manual_seed(crc32c(f"{self.seed} {weight.name}".encode()))
        shape = (*outer, columns // self.pattern.m, len(self._candidates))
        logits = (torch.randn(shape, generator=generator) * sigma).to(device)
        if prior is not None:
            if weight.name not in prior:
                raise QmoeError("E_MISSING", "the prior has no mask of this weight", tensor=weight.name)
            mask = prior[weight.name]
            if tuple(mask.shape) != weight.shape:
                raise QmoeError("E_SHAPE", "a prior for another shape", tensor=weight.name, expected=weight.shape,
                                actual=tuple(mask.shape))  # fmt: skip
            groups = mask.to(device).unflatten(-1, (-1, self.pattern.m)).float()
            overlap = groups @ self._candidates.to(device).T
            logits += logits.std() * alpha * (overlap - self.pattern.n / 2)
        return nn.Parameter(logits)

    # How weights are masked.

    def _install(self) -> None:
        of_module: dict[int, tuple[nn.Module, list[Weight]]] = {}
        for weight in self.weights.values():
            of_module.setdefault(id(weight.module), (weight.module, []))[1].append(weight)
        for module, weights in of_module.values():

            def before(module: nn.Module, _: Any, weights: list[Weight] = weights) -> None:
                for weight in weights:  # a plain tensor in a parameter's place: nothing is renamed or reordered
                    module._parameters[weight.attribute] = self._masked(weight)  # type: ignore[assignment]

            def behind(module: nn.Module, *_: Any, weights: list[Weight] = weights) -> None:
                for weight in weights:
                    module._parameters[weight.attribute] = weight.parameter

            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(behind, always_call=True))

    def _masked(self, weight: Weight) -> torch.Tensor:
        mask = self._sample(weight.name) if weight.module.training else self._best(weight.name)
        return weight.parameter.detach() * weight.matrices(mask).to(weight.parameter.dtype)

    def _sample(self, name: str) -> torch.Tensor:
        """A soft mask (..., N, K) float32; the same for the same step, so that it can be made again."""
        logits = self.logits[name]
        generator = torch.Generator(logits.device)
        generator.manual_seed(crc32c(f"{self.seed} {self._step} {self._rank} {name}".encode()))
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
        noise = -(-uniform.clamp_(min=TINY).log()).clamp_(min=TINY).log()
        chosen = ((self.kappa * logits + noise) / self.tau).softmax(-1)
        return (chosen @ self._candidates.to(logits.device)).flatten(-2)

    def _best(self, name: str) -> torch.Tensor:
        """The mask (..., N, K) float32 of the largest logits."""
        logits = self.logits[name].detach()
        return self._candidates.to(logits.device)[logits.argmax(-1)].flatten(-2)

    # What training needs.

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: give it to an optimizer."""
        return iter(self.logits.values())

    def step(self, done: int, steps: int) -> None:
        """Before step `done` (from 0) of `steps`: sets scale, temperature, regularisation, and takes a new sample."""
        if not 0 <= done < max(steps, 1):
            raise QmoeError("E_VALUE", "no such step", expected=f"0 to {steps - 1}", actual=done)
        part = done / max(steps, 1)
        for name, (first, last) in self._range.items():
            setattr(self, name, first + (last - first) * part)
        self._step, self._rank = done, place()[0]

    def regulariser(self) -> torch.Tensor:
        """-reg * sum over all weights of ||W * mask||^2, with the masks of this step."""
        total = torch.zeros((), device=next(iter(self.logits.values())).device)
        for name, weight in self.weights.items():
            value = weight.matrices(weight.parameter.detach()).float()
            total = total + (value * self._sample(name)).square().sum()
        return -self.reg * total

    def train(
        self,
        batches: Callable[[int], torch.Tensor],
        steps: int = 2000,
        *,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        dtype: str = "float32",
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
        state: Path | None = None,
        every: int = 100,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Trains the logits; see `mask_training.train_masks`, whose arguments these are."""
        return train_masks(
            self, batches, steps, lr=lr, weight_decay=weight_decay, clip=clip, dtype=dtype, loss=loss, state=state,
            every=every, progress=progress,
        )  # fmt: skip

    # What it has made.

    @property
    def masks(self) -> Masks:
        """The best masks so far."""
        transposed = [name for name, weight in self.weights.items() if weight.transposed]
        return Masks({name: self._best(name).bool() for name in self.weights}, self.pattern, transposed)

    def finish(self) -> Masks:
        """Sets the weights that go to zero and lets the model train again. Returns the masks."""
        masks = self.masks
        for handle in self._handles:
            handle.remove()
        self._handles = []
        masks.apply(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return masks

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The logits by name."""
        return {name: logits.detach() for name, logits in self.logits.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises `E_MISSING`, `E_SHAPE`."""
        for name, logits in self.logits.items():
            if name not in state:
                raise QmoeError("E_MISSING", "the state has no logits of this weight", tensor=name)
            if state[name].shape != logits.shape:
                raise QmoeError("E_SHAPE", "logits of another shape", tensor=name, expected=tuple(logits.shape),
                                actual=tuple(state[name].shape))  # fmt: skip
        for name, logits in self.logits.items():
            logits.copy_(state[name])
