"""Pruning by a score per weight; the weights that are kept stay as they are.

magnitude   |w|
random      uniform numbers, by `seed` and the name of the tensor
wanda       |w| * ||x||_2 of the column's inputs, compared within a row (Sun et al., arXiv 2306.11695)

A new criterion is one function like these.
"""

from __future__ import annotations

import torch

from ..quantize.base import StackStatistics
from ..store import crc32c
from .patterns import Pattern, Unstructured
from .spec import Pruned, PruneSpec, moments, number

MAGNITUDE_OPTIONS: frozenset[str] = frozenset()
RANDOM_OPTIONS = frozenset({"seed"})
WANDA_OPTIONS = frozenset({"prior"})


def magnitude(weight: torch.Tensor, statistics: StackStatistics | None, spec: PruneSpec, tensor: str) -> Pruned:
    """The largest weights (E, N, K) are kept."""
    return Pruned.by_mask(weight, spec.pattern.select(weight.abs(), spec.sparsity))


def random(weight: torch.Tensor, statistics: StackStatistics | None, spec: PruneSpec, tensor: str) -> Pruned:
    """Any weights are kept: what every other criterion has to beat. Option: `seed` (0)."""
    seed = int(number(spec, "seed", 0, 0, 2**31 - 1))
    generator = torch.Generator().manual_seed(crc32c(f"{seed} {tensor}".encode()))
    scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    return Pruned.by_mask(weight, spec.pattern.select(scores, spec.sparsity))


def within_rows(pattern: Pattern) -> Pattern:
    """Wanda compares within the rows of a matrix: unstructured means that for it."""
    return Unstructured("row") if isinstance(pattern, Unstructured) else pattern


def wanda(weight: torch.Tensor, statistics: StackStatistics | None, spec: PruneSpec, tensor: str) -> Pruned:
    """Option: `prior` (0.25), how much the layer's pooled statistics weigh, in tokens per column."""
    assert statistics is not None
    hessian, notes = moments(statistics, spec)
    scores = weight.abs() * hessian.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    return Pruned.by_mask(weight, within_rows(spec.pattern).select(scores, spec.sparsity), notes)
