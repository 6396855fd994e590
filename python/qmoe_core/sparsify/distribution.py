"""How much of the zeros each tensor takes, where all of them together are to reach a sparsity.

uniform   the same share everywhere
erk       Erdos-Renyi kernel (Evci et al., arXiv 1911.11134): what is kept of a matrix (N, K) is proportional to
          N + K; matrices of which more than all would be kept stay whole, and the others make up for them
global    the highest scores of all tensors together are kept, wherever they are
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from ..errors import QmoeError
from .patterns import Sparsity, as_stack, check_sparsity, kept_count

DISTRIBUTIONS = ("uniform", "erk", "global")


def distribute(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    kind: str = "uniform",
    scores: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Sparsity]:
    """The sparsity of every tensor, for `Pattern.select`.

    Args:
        shapes: (N, K) or (E, N, K) by name. A stack counts as E matrices.
        sparsity: share of all weights of all tensors that become zero, in [0, 1].
        kind: "uniform", "erk" or "global".
        scores: by name, for "global": what the weights are worth, comparable between tensors.

    Returns:
        A number per name; for "global" and stacks, E numbers. Equal scores: earlier names and lower indices are kept.

    Raises:
        QmoeError: `E_VALUE` (unknown kind, sparsity outside [0, 1], NaN scores), `E_SHAPE`, `E_MISSING` (scores).

    Example:
        >>> from qmoe_core.sparsify import distribute
        >>> distribute({"wide": (64, 64), "narrow": (64, 8)}, 0.5, "erk")
        {'wide': 0.5625, 'narrow': 0.0}
    """
    check_sparsity(sparsity)
    for name, shape in shapes.items():
        if len(shape) not in (2, 3) or 0 in shape:
            raise QmoeError("E_SHAPE", "sparsity is for matrices and stacks of them", tensor=name, actual=tuple(shape))
    if kind == "uniform":
        return dict.fromkeys(shapes, float(sparsity))
    if kind == "erk":
        return dict(_erdos_renyi(shapes, sparsity))
    if kind == "global":
        return _global(shapes, sparsity, scores or {})
    raise QmoeError("E_VALUE", "unknown distribution of sparsity", expected=DISTRIBUTIONS, actual=kind)


def _erdos_renyi(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    zeros = {name: int(sparsity * size) for name, size in sizes.items()}  # whole weights, as JaxPruner counts
    raw = {name: sum(shape[-2:]) / (shape[-2] * shape[-1]) for name, shape in shapes.items()}
    whole: set[str] = set()
    while len(whole) < len(shapes):
        others = [name for name in shapes if name not in whole]
        kept = sum(sizes[name] - zeros[name] for name in others) - sum(zeros[name] for name in whole)
        scale = kept / sum(raw[name] * sizes[name] for name in others)
        most = max(raw[name] for name in others)
        if scale * most <= 1.0:
            # Rounding must not leave the range.
            return {name: 0.0 if name in whole else min(max(1.0 - scale * raw[name], 0.0), 1.0) for name in shapes}
        whole |= {name for name in others if raw[name] == most}
    return dict.fromkeys(shapes, 0.0)


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """float32 numbers as int64 in [0, 2^32), in the same order (a sign bit turns the order of the rest around)."""
    bits = scores.detach().to("cpu", torch.float32).add(0.0).reshape(-1).view(torch.int32).long()  # no -0.0
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31)) if bits.numel() else bits


def kth_largest(scores: Callable[[], Iterable[torch.Tensor]], keep: int) -> float:
    """The `keep`-th largest of all float32 numbers that `scores()` yields, exactly, without ever holding or sorting all
    of them: it counts them twice, by the upper and then by the lower half of their bits, so `scores` is called twice.

    Raises:
        QmoeError: `E_VALUE` for NaN, or fewer numbers than `keep`.
    """
    upper: int | None = None
    for _ in range(2):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in scores():
            if bool(tensor.isnan().any()):
                raise QmoeError("E_VALUE", f"{int(tensor.isnan().sum())} scores are NaN")
            keys = _ordered(tensor)
            half = keys >> 16 if upper is None else keys[keys >> 16 == upper] & 0xFFFF
            counts += torch.bincount(half, minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, keep))
        if place == 1 << 16:
            raise QmoeError("E_VALUE", "there are fewer scores than are to be kept", expected=keep)
        digit = (1 << 16) - 1 - place
        keep -= int(from_top[place]) - int(counts[digit])
        if upper is None:
            upper = digit
    assert upper is not None
    key = upper << 16 | digit
    bits = key - (1 << 31) if key >= 1 << 31 else -1 - key
    return float(np.array(bits, dtype=np.int64).astype(np.int32).view(np.float32))


def _global(
    shapes: Mapping[str, Sequence[int]], sparsity: float, scores: Mapping[str, torch.Tensor]
) -> dict[str, Sparsity]:
    for name, shape in shapes.items():
        if name not in scores:
            raise QmoeError("E_MISSING", "a global distribution needs the scores of every tensor", tensor=name)
        if tuple(scores[name].shape) != tuple(shape):
            raise QmoeError("E_SHAPE", "scores for another tensor", tensor=name, expected=tuple(shape),
                            actual=tuple(scores[name].shape))  # fmt: skip
    size = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    left = kept_count(size, sparsity) if size else 0
    if left == 0:
        return dict.fromkeys(shapes, 1.0)
    threshold = kth_largest(lambda: (scores[name] for name in shapes), left)
    above: dict[str, list[int]] = {}
    level: dict[str, list[int]] = {}
    for name in shapes:
        stack = as_stack(scores[name].detach()).float()
        above[name] = (stack > threshold).sum((1, 2)).tolist()
        level[name] = (stack == threshold).sum((1, 2)).tolist()
    left -= sum(map(sum, above.values()))
    result: dict[str, Sparsity] = {}
    for name, shape in shapes.items():
        shares = []
        for count, equal in zip(above[name], level[name], strict=True):
            taken = min(equal, left)
            left -= taken
            shares.append(1.0 - (count + taken) / (shape[-2] * shape[-1]))
        result[name] = shares if len(shape) == 3 else shares[0]
    return result
