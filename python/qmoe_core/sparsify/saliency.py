"""What experts are worth, from what they do on calibration text.

reap        mean over the tokens of an expert of g * ||f(x)||_2, g being its routing weight and f(x) what it makes of
            the token (Lasby et al., arXiv 2510.13999)
frequency   how many tokens it gets
ean_sum     sum over them of ||f(x)||_2 (expert activation norm); ean_mean: the mean
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import QmoeError
from ..families import Target
from .patterns import largest

# (experts, 3) float64: tokens, sum of ||f||, sum of g ||f|| -> (experts,) scores; experts without tokens get 0.
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reap": lambda sums: sums[:, 2] / sums[:, 0].clamp(min=1),
    "frequency": lambda sums: sums[:, 0],
    "ean_sum": lambda sums: sums[:, 1],
    "ean_mean": lambda sums: sums[:, 1] / sums[:, 0].clamp(min=1),
}

Sums = dict[str, list[list[float]]]  # by path of the experts module: as above, plain JSON types


class Collector:
    """Adds up what experts do (`calibration.experts.Observe`), layer by layer."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def __call__(self, target: Target, expert: int, gate: torch.Tensor, states: torch.Tensor) -> None:
        if target.module not in self._sums:
            self._sums[target.module] = torch.zeros(target.shape[0], 3, dtype=torch.float64)
        norms = torch.linalg.vector_norm(states.float(), dim=1).double()
        weighted = norms @ gate.reshape(-1).to(norms)
        self._sums[target.module][expert] += torch.stack([norms.new_tensor(len(norms)), norms.sum(), weighted]).cpu()

    def take(self, _: object) -> Sums:
        """What was added up since the last call."""
        taken, self._sums = self._sums, {}
        return {module: sums.tolist() for module, sums in taken.items()}


def merged(parts: Sequence[Mapping[str, list[list[float]]]]) -> Sums:
    """What several processes have added up over their tokens."""
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        for module, sums in part.items():
            here = torch.tensor(sums, dtype=torch.float64)
            total[module] = total[module] + here if module in total else here
    return {module: sums.tolist() for module, sums in total.items()}


def best_experts(sums: list[list[float]], score: str, keep: int, groups: int = 1) -> list[int]:
    """The numbers of the `keep` experts with the highest scores, ascending; of equal ones the lower number. Where
    routers choose groups first, equally many of each.

    Raises:
        QmoeError: `E_UNKNOWN` score.
    """
    if score not in SCORES:
        raise QmoeError("E_UNKNOWN", "unknown score of experts", expected=sorted(SCORES), actual=score)
    scores = SCORES[score](torch.tensor(sums, dtype=torch.float64))
    kept: list[int] = largest(scores.view(groups, -1), keep // groups).reshape(-1).nonzero()[:, 0].tolist()
    return kept
