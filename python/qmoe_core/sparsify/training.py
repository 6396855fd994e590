"""Sparse training: masks that change by a schedule while any torch optimizer trains the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import QmoeError
from .distribution import distribute
from .masks import MaskEntry, Masks
from .patterns import NM, Pattern, Sparsity, Unstructured, check_sparsity
from .rules import RULES, Moment, check_target, drop_share, exchange, noise_like, select
from .schedules import Constant, Periodic, Schedule
from .selection import Weight, select_weights

DECAY = 0.999  # of the running mean of squared gradients, where the optimizer keeps none
STATE = "qmoe_sparsifier"  # the key in an optimizer's state dict


class Sparsifier:
    """Keeps a model sparse while it is trained, and decides which weights are zero.

    rule        how masks change                                                      usual schedule
    magnitude   the largest weights are kept: gradual pruning, one-shot, AC/DC        `Cubic`, `OneShot`, `ACDC`
    saliency    the largest |w g|                                                     the same
    fisher      the largest w^2 v, v the mean of squared gradients (Adam's)           the same
    random      any                                                                   the same
    static      a random mask that stays                                              `Constant`
    set, rigl   a share of the smallest weights is dropped, others grow at random,    `Periodic`
                or where the gradient is largest
    ste         straight through: the forward pass sees the largest weights only,     `Cubic`, `OneShot`
                all are trained

    Behind each step of the optimizer the masks are applied; gradients of weights that are zero are cleared before it
    (but for ste), and the optimizer's running means of weights that go or come. On a step on which masks change, RigL
    and SET let the optimizer take its step first.

    Masks, step count and whatever else goes on are part of the optimizer's own `state_dict`, so a checkpoint of the
    optimizer (that of transformers' Trainer, for one) has everything; `state_dict` gives them alone.

    Attributes:
        weights: by name, what is made sparse. steps: of the optimizer, since `attach`.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Cubic, Sparsifier
        >>> model = torch.nn.Linear(16, 16)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = Sparsifier(model, "unstructured", 0.75, schedule=Cubic(0, 8, every=2)).attach(optimizer)
        >>> for _ in range(8):
        ...     model(torch.randn(4, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sparsifier.masks.sparsity(), int((model.weight == 0).sum())
        (0.75, 192)
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
        distribution: str = "uniform",
        schedule: Schedule | None = None,
        rule: str = "magnitude",
        *,
        roles: Sequence[str] = ("expert",),
        names: Sequence[str] | None = None,
        masks: Masks | None = None,
        drop: float = 0.3,
        seed: int = 0,
    ) -> None:
        """
        Args:
            pattern: a `Pattern` or its text.
            sparsity: share of zeros in the end; may be left out where the pattern fixes it.
            distribution: "uniform", "erk" or "global" (by comparable scores).
            schedule: when masks change; None: never after the start.
            rule: one of `RULES`.
            roles, names: which weights (`select_weights`).
            masks: to begin with, for all of these weights, where the schedule begins sparse: of one-shot pruning, say.
            drop: the share of kept weights that RigL and SET exchange, at first; along a cosine to zero at the end of a
                `Periodic` schedule, if that has one.
            seed: of random masks.

        Raises:
            QmoeError: `E_UNKNOWN` (rule), `E_VALUE` (sparsity, distribution, a pattern that a rule cannot keep),
                `E_MISSING` (no such weights, no mask for one), `E_SHAPE` (not divisible as the pattern needs).
        """
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.weights = select_weights(model, roles, names)
        self.schedule = schedule or Constant()
        self.sparsity = check_target(self.pattern, sparsity, distribution, rule)
        self.rule, self._rule, self.distribution = rule, RULES[rule], distribution
        self.drop, self.seed, self.steps = check_sparsity(drop), seed, 0
        for name, weight in self.weights.items():
            try:
                self.pattern.check_shape(weight.shape)
            except QmoeError as error:
                raise error.locate(tensor=name) from None
        self._targets: dict[str, Sparsity] = {}
        if distribution != "global":
            self._targets = distribute({n: w.shape for n, w in self.weights.items()}, self.sparsity, distribution)
        self._masks = {
            name: torch.ones(weight.shape, dtype=torch.bool, device=weight.parameter.device)
            for name, weight in self.weights.items()
        }
        self._dense: dict[str, torch.Tensor] = {}  # of ste: all weights; the parameters are those that are kept
        self._squares: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._begin(masks)

    @torch.no_grad()
    def _begin(self, masks: Masks | None) -> None:
        if self._rule.straight_through:
            self._dense = {name: weight.parameter.detach().clone() for name, weight in self.weights.items()}
        if masks is not None:
            for name, weight in self.weights.items():
                if name not in masks:
                    raise QmoeError("E_MISSING", "no mask to begin with", tensor=name)
                if tuple(masks[name].shape) != weight.shape:
                    raise QmoeError("E_SHAPE", "a mask for another shape", tensor=name, expected=weight.shape,
                                    actual=tuple(masks[name].shape))  # fmt: skip
                self._masks[name] = masks[name].to(weight.parameter.device)
        elif self.schedule.sparsity(-1, self.sparsity) > 0:
            rule = RULES["random"] if self._rule.draws else RULES["magnitude"]  # there are no gradients yet
            self._select({name: rule.score(self._moment(name)) for name in self.weights}, -1)
        self._apply()

    # What the optimizer calls.

    def attach(self, optimizer: Optimizer) -> Sparsifier:
        """Does its work before and behind every step of this optimizer, which must train all of the weights. Returns
        itself. Raises `E_VALUE`."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights.items():
            if id(weight.parameter) not in trained:
                raise QmoeError("E_VALUE", "the optimizer does not train this weight", tensor=name)
        self.detach()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._behind()),
            optimizer.register_state_dict_post_hook(lambda _, state: {**state, STATE: self.state_dict()}),
            optimizer.register_load_state_dict_pre_hook(self._load_from),
        ]
        return self

    def detach(self) -> None:
        """Leaves the optimizer alone. The weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def _load_from(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if STATE not in state:
            raise QmoeError("E_MISSING", "the optimizer's state was saved without the masks", expected=STATE)
        self.load_state_dict(state[STATE])
        return {key: value for key, value in state.items() if key != STATE}

    @torch.no_grad()
    def _before(self) -> None:
        changes = self.schedule.changes(self.steps)
        for name, weight in self.weights.items():
            gradient = weight.parameter.grad
            if self._rule.straight_through:
                weight.parameter.copy_(self._dense[name])
                continue
            if gradient is None:
                continue
            if changes and self._rule.needs == "gradient":
                self._gradients[name] = weight.matrices(gradient).float().clone()
            if self._rule.needs == "square" and "exp_avg_sq" not in self._memory(weight):
                square = weight.matrices(gradient).float().square()
                mean = self._squares.setdefault(name, torch.zeros_like(square))
                mean.mul_(DECAY).add_(square, alpha=1 - DECAY)
            weight.matrices(gradient).mul_(self._masks[name])

    @torch.no_grad()
    def _behind(self) -> None:
        step, self.steps = self.steps, self.steps + 1
        for name in self._dense:
            self._dense[name].copy_(self.weights[name].parameter)
        if self.schedule.changes(step):
            self._change(step)
        self._gradients.clear()
        self._apply()

    # How masks change.

    def _change(self, step: int) -> None:
        before = dict(self._masks)
        if self.schedule.sparsity(step, self.sparsity) == 0:
            self._masks = {name: torch.ones_like(mask) for name, mask in self._masks.items()}
        elif self._rule.exchanges:
            assert self._rule.grow is not None and isinstance(self.pattern, Unstructured)
            end = self.schedule.end if isinstance(self.schedule, Periodic) else None
            drop = drop_share(self.drop, step, end)
            for name, mask in before.items():
                moment = self._moment(name, step)
                scores, grow = self._rule.score(moment), self._rule.grow(moment)
                self._masks[name] = exchange(self.pattern, mask, scores, grow, drop)
        else:
            worth = {name: self._rule.score(self._moment(name)) for name in self.weights}
            if not self._rule.straight_through:  # a weight of a dead unit is worth as little as one that is gone
                worth = {name: score.masked_fill(~self._masks[name], -1) for name, score in worth.items()}
            self._select(worth, step)
        if not self._rule.straight_through:
            for name, mask in self._masks.items():
                self._forget(self.weights[name], mask != before[name])

    def _select(self, scores: Mapping[str, torch.Tensor], step: int) -> None:
        """Keeps the highest scores."""
        targets = self._targets
        if self.distribution == "global":
            shapes = {name: weight.shape for name, weight in self.weights.items()}
            targets = distribute(shapes, self.schedule.sparsity(step, self.sparsity), "global", scores)
        for name, score in scores.items():
            target = targets[name]
            if self.distribution != "global":
                assert isinstance(target, float)
                target = self.schedule.sparsity(step, target)
            try:
                self._masks[name] = select(self.pattern, score, target)
            except QmoeError as error:
                raise error.locate(tensor=name) from None

    def _moment(self, name: str, step: int | None = None) -> Moment:
        weight = self.weights[name]
        value = weight.matrices(self._dense.get(name, weight.parameter)).detach().float()
        needs, gradient, square = self._rule.needs, self._gradients.get(name), None
        if self.steps and needs == "gradient" and gradient is None:
            raise QmoeError("E_VALUE", f"rule '{self.rule}' needs a gradient on this step", tensor=name)
        if self.steps and needs == "square":
            square = self._square(name)
        noise = noise_like(value, self.seed, name) if step is None else noise_like(value, self.seed, name, step)
        return Moment(value, gradient, square, noise)

    def _square(self, name: str) -> torch.Tensor:
        """Adam's running mean of squared gradients; where the optimizer has none, our own. (Adam's misses the gradients
        of weights that are zero, which stay so by any score with a factor w.)"""
        weight = self.weights[name]
        found = self._memory(weight).get("exp_avg_sq")
        if isinstance(found, torch.Tensor) and found.shape == weight.parameter.shape:
            return weight.matrices(found).float()
        if name not in self._squares:
            raise QmoeError("E_VALUE", f"rule '{self.rule}' needs a gradient before masks change", tensor=name)
        return self._squares[name]

    def _memory(self, weight: Weight) -> Mapping[str, Any]:
        """What the optimizer keeps of a weight."""
        return {} if self._optimizer is None else self._optimizer.state.get(weight.parameter, {})

    def _forget(self, weight: Weight, changed: torch.Tensor) -> None:
        """Clears the optimizer's memory of weights that go or come."""
        for value in self._memory(weight).values():
            if isinstance(value, torch.Tensor) and value.shape == weight.parameter.shape:
                weight.matrices(value).masked_fill_(changed, 0)

    def _apply(self) -> None:
        for name, weight in self.weights.items():
            weight.matrices(weight.parameter.data).masked_fill_(~self._masks[name], 0)

    # What it has made.

    @property
    def masks(self) -> Masks:
        """The masks as they are now."""
        on_the_way = isinstance(self.pattern, NM) and not all(map(self.pattern.fits, self._masks.values()))
        pattern = Unstructured() if on_the_way else self.pattern
        transposed = [name for name, weight in self.weights.items() if weight.transposed]
        return Masks({name: mask.clone() for name, mask in self._masks.items()}, pattern, transposed)

    def report(self) -> list[MaskEntry]:
        """The masks in numbers."""
        return self.masks.report()

    def finish(self) -> Masks:
        """Detaches; the weights stay masked. Returns the masks."""
        self.detach()
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs beside the model's and the optimizer's own state: plain types and tensors by
        parameter name."""
        return {
            "rule": self.rule,
            "pattern": str(self.pattern),
            "steps": self.steps,
            "masks": dict(self._masks),
            "dense": dict(self._dense),
            "squares": dict(self._squares),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, in a model with the weights of then.

        Raises:
            QmoeError: `E_CHANGED` (another rule or pattern), `E_MISSING`, `E_SHAPE` (other weights).
        """
        for key, mine in (("rule", self.rule), ("pattern", str(self.pattern))):
            if state[key] != mine:
                raise QmoeError("E_CHANGED", f"the state is of another {key}", expected=mine, actual=state[key])
        for name, weight in self.weights.items():
            if name not in state["masks"]:
                raise QmoeError("E_MISSING", "the state has no mask of this weight", tensor=name)
            if tuple(state["masks"][name].shape) != weight.shape:
                raise QmoeError("E_SHAPE", "a mask for another shape", tensor=name, expected=weight.shape,
                                actual=tuple(state["masks"][name].shape))  # fmt: skip
        self.steps = int(state["steps"])
        for name, weight in self.weights.items():
            device = weight.parameter.device
            self._masks[name] = state["masks"][name].to(device).clone()
            for own, found in ((self._dense, state["dense"]), (self._squares, state["squares"])):
                if name in found:
                    own[name] = found[name].to(device).clone()
        self._apply()
