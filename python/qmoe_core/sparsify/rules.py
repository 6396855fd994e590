"""What a weight is worth while a model is trained, and which weights take turns.

scores    magnitude |w|, saliency |w g|, fisher w^2 v, random: the highest are kept
exchange  rigl, set: some of the smallest weights are dropped and as many others grow from zero
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import QmoeError
from ..store import crc32c
from .distribution import DISTRIBUTIONS
from .patterns import NM, Pattern, Sparsity, Unstructured, check_sparsity


@dataclass(frozen=True)
class Moment:
    """What a rule may look at for one weight, all of one shape, (N, K) or (E, N, K).

    Attributes:
        weight: as the step has left it. gradient: of the loss, dense, or None. square: the running mean of its square,
            or None. noise: uniform numbers.
    """

    weight: torch.Tensor
    gradient: torch.Tensor | None
    square: torch.Tensor | None
    noise: torch.Tensor


def magnitude(moment: Moment) -> torch.Tensor:
    """|w| (Han et al., arXiv 1506.02626)."""
    return moment.weight.abs()


def saliency(moment: Moment) -> torch.Tensor:
    """|w g|: by how much the loss changes without the weight, to first order (Mozer and Smolensky, 1989)."""
    assert moment.gradient is not None
    return (moment.weight * moment.gradient).abs()


def fisher(moment: Moment) -> torch.Tensor:
    """w^2 v: the same to second order, with the running mean of squared gradients, which Adam keeps, for the diagonal
    of the Hessian (Theis et al., arXiv 1801.05787)."""
    assert moment.square is not None
    return moment.weight.square() * moment.square


def random(moment: Moment) -> torch.Tensor:
    """The same uniform numbers at every step."""
    return moment.noise


@dataclass(frozen=True)
class Rule:
    """One of `RULES`.

    Attributes:
        score: of the weights: those with the highest are kept. grow: of RigL and SET, what those that grow are chosen
            by. needs: "gradient", "square" or "".
        straight_through: weights that are not kept go on being trained, with the gradients of zero.
        exchanges: masks change at constant sparsity, for unstructured patterns.
        draws: the first mask is random.
    """

    score: Callable[[Moment], torch.Tensor]
    grow: Callable[[Moment], torch.Tensor] | None = None
    needs: str = ""
    straight_through: bool = False
    draws: bool = False

    @property
    def exchanges(self) -> bool:
        return self.grow is not None


def _gradient(moment: Moment) -> torch.Tensor:
    assert moment.gradient is not None
    return moment.gradient.abs()


RULES: dict[str, Rule] = {
    "magnitude": Rule(magnitude),
    "saliency": Rule(saliency, needs="gradient"),
    "fisher": Rule(fisher, needs="square"),
    "random": Rule(random),
    "static": Rule(random, draws=True),
    "set": Rule(magnitude, grow=random, draws=True),  # Mocanu et al., arXiv 1707.04780
    "rigl": Rule(magnitude, grow=_gradient, needs="gradient", draws=True),  # Evci et al., arXiv 1911.11134
    "ste": Rule(magnitude, straight_through=True),  # Bengio et al., arXiv 1308.3432
}


def check_target(pattern: Pattern, sparsity: float | None, distribution: str, rule: str) -> float:
    """The sparsity that training ends with. Raises `E_UNKNOWN` (rule), `E_VALUE` (sparsity, distribution, a pattern
    that the rule cannot keep)."""
    if rule not in RULES:
        raise QmoeError("E_UNKNOWN", "unknown rule of sparse training", expected=sorted(RULES), actual=rule)
    if distribution not in DISTRIBUTIONS:
        raise QmoeError("E_VALUE", "unknown distribution", expected=DISTRIBUTIONS, actual=distribution)
    fixed = pattern.sparsity
    if fixed is not None and distribution != "uniform":
        raise QmoeError("E_VALUE", f"pattern '{pattern}' is the same everywhere", expected="uniform",
                        actual=distribution)  # fmt: skip
    if distribution == "global" and not isinstance(pattern, Unstructured):
        raise QmoeError("E_VALUE", "a global distribution is for unstructured sparsity", actual=str(pattern))
    if RULES[rule].exchanges and not isinstance(pattern, Unstructured):
        raise QmoeError("E_VALUE", f"rule '{rule}' exchanges single weights", expected="unstructured",
                        actual=str(pattern))  # fmt: skip
    if RULES[rule].draws and distribution == "global":
        raise QmoeError("E_VALUE", f"rule '{rule}' draws masks", expected=("uniform", "erk"), actual="global")
    if sparsity is None:
        if fixed is None:
            raise QmoeError("E_VALUE", f"pattern '{pattern}' needs a sparsity")
        return fixed
    if fixed is not None and abs(sparsity - fixed) > 1e-6:
        raise QmoeError("E_VALUE", f"pattern '{pattern}' has its own sparsity", expected=fixed, actual=sparsity)
    return check_sparsity(sparsity)


def noise_like(weight: torch.Tensor, *seeds: int | str) -> torch.Tensor:
    """Uniform numbers of the shape and on the device of a weight, float32, by the seeds alone."""
    generator = torch.Generator().manual_seed(crc32c(" ".join(map(str, seeds)).encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def select(pattern: Pattern, scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """`Pattern.select`; n:m also at less than its own sparsity, on the way there: its winners are kept first, and of
    the others the best (JaxPruner's iterative n:m)."""
    if not isinstance(pattern, NM):
        return pattern.select(scores, sparsity)
    winners = pattern.select(scores)
    share = max(sparsity) if isinstance(sparsity, Sequence) else sparsity
    if share >= pattern.sparsity - 1e-9:
        return winners
    return Unstructured().select(scores.float().masked_fill(winners, math.inf), sparsity)


def exchange(
    pattern: Unstructured, mask: torch.Tensor, scores: torch.Tensor, grow: torch.Tensor, drop: float
) -> torch.Tensor:
    """Drops the share `drop` of the kept weights, those with the lowest scores, and grows as many of the others, those
    with the highest `grow`; what was just dropped may grow again."""
    size = mask[0].numel() if mask.ndim == 3 else mask.numel()
    kept = [int(matrix.sum()) for matrix in (mask if mask.ndim == 3 else mask[None])]
    left = [count - int(drop * count) for count in kept]
    survivors = pattern.select(scores.float().masked_fill(~mask, -math.inf), [1 - count / size for count in left])
    return pattern.select(grow.float().masked_fill(survivors, math.inf), [1 - count / size for count in kept])


def drop_share(drop: float, step: int, end: int | None) -> float:
    """RigL's share of dropped weights: `drop` at first, along a cosine to zero at step `end`."""
    return drop if not end else drop / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))
