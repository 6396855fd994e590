"""What a pruning job does to every weight, decided before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from ..families import Target
from ..plan import layer_of
from ..source import SourceCheckpoint
from .distribution import distribute, kth_largest
from .patterns import Pattern, Sparsity, kept_count
from .report import PruneSettings
from .spec import PruneSpec
from .treatment import Pruning

Treatments = dict[str, tuple[Target, Pruning]]  # by target name


def treatments_of(checkpoint: SourceCheckpoint, targets: list[Target], settings: PruneSettings) -> Treatments:
    """What is done to every target, its share of the zeros included. Raises `E_SHAPE`, `E_DTYPE`."""
    pattern = Pattern.parse(settings.pattern)
    shares: dict[str, Sparsity | None] = dict.fromkeys((target.name for target in targets), None)
    if settings.distribution == "global":
        assert settings.sparsity is not None
        shares |= _by_magnitude(checkpoint, targets, settings.sparsity)
    elif settings.sparsity is not None:
        shapes = {target.name: target.shape for target in targets}
        shares |= distribute(shapes, settings.sparsity, settings.distribution)
    result = {}
    for target in targets:
        spec = PruneSpec(settings.method, pattern, shares[target.name], settings.options)
        result[target.name] = target, Pruning(target, spec, checkpoint)
    return result


def _by_magnitude(checkpoint: SourceCheckpoint, targets: list[Target], sparsity: float) -> dict[str, Sparsity]:
    """`distribute` by the magnitude of all weights, which are read three times instead of being kept in memory."""

    def scores() -> Iterator[torch.Tensor]:
        return (matrix.abs() for target in targets for matrix in target.matrices(checkpoint.read))

    left = kept_count(sum(prod(target.shape) for target in targets), sparsity)
    threshold = kth_largest(scores, left) if left else float("inf")
    counts = [(int((matrix > threshold).sum()), int((matrix == threshold).sum())) for matrix in scores()]
    left -= sum(above for above, _ in counts)
    shares: dict[str, Sparsity] = {}
    rest = iter(counts)
    for target in targets:
        experts, rows, columns = target.shape
        here: list[float] = []
        for _ in range(experts):
            above, level = next(rest)
            taken = min(level, left)
            left -= taken
            here.append(1.0 - (above + taken) / (rows * columns))
        shares[target.name] = here
    return shares


def largest_layer(checkpoint: SourceCheckpoint, targets: list[Target]) -> int:
    """Bytes of the largest layer with a target, at 2 bytes per parameter, as compression counts."""
    layers: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        layers[layer_of(name)] = layers.get(layer_of(name), 0) + 2 * tensor.elements
    return max(layers[layer_of(name)] for target in targets for name in target.source_names)
