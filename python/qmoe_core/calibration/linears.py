"""Linear layers (attention, shared experts, dense MLPs): statistics of their inputs, gathered while a layer runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import QmoeError
from ..families import Target
from ..quantize.base import StackStatistics
from .distributed import Group
from .sums import add_products, add_squares, complete


class LinearStatistics:
    """Sums over all tokens of x x^T of some linear layers' inputs, each (K, K) float32.

    With drift, run the original layer inside `original` and then the compressed one inside `compressed`, batch by
    batch; without, only the latter.
    """

    def __init__(self, targets: list[Target], device: str, drift: bool) -> None:
        self.targets = targets
        sizes = {target.name: target.shape[2] for target in targets}
        self.hessian = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()}
        self.drift = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()} if drift else {}
        self.tokens = dict.fromkeys(sizes, 0)
        self._original: dict[str, list[torch.Tensor]] = {}

    @contextlib.contextmanager
    def _hooks(self, layer: nn.Module, prefix: str, take: object) -> Iterator[None]:
        handles = []
        for target in self.targets:
            module = layer.get_submodule(target.module.removeprefix(f"{prefix}."))

            def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = target.name) -> None:
                take(name, arguments[0].reshape(-1, arguments[0].shape[-1]).float())  # type: ignore[operator]

            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def original(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """The original layer runs inside the block."""
        self._original = {name: [] for name in self.hessian}
        with self._hooks(layer, prefix, lambda name, x: self._original[name].append(x.clone())):
            yield

    @contextlib.contextmanager
    def compressed(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """The compressed layer runs inside the block, on the same windows."""
        with self._hooks(layer, prefix, self._take):
            yield

    def _take(self, name: str, x: torch.Tensor) -> None:
        self.tokens[name] += len(x)
        add_squares(self.hessian[name], x)
        if self.drift:
            before = self._original[name].pop(0) if self._original[name] else None
            if before is None or before.shape != x.shape:
                raise QmoeError("E_LAYOUT", "drift needs layers that see the same tokens in both models", tensor=name)
            add_products(self.drift[name], before - x, x)

    def share(self, group: Group) -> None:
        """Adds up the sums over the tokens of all processes, those of each layer on its owner (`owner`)."""
        for target in self.targets:
            owner = self.owner(target, group)
            complete(self.hessian[target.name])
            group.sum_to(self.hessian[target.name], owner)
            if self.drift:
                group.sum_to(self.drift[target.name], owner)
        tokens = group.gather_all(self.tokens)
        self.tokens = {name: sum(by_name[name] for by_name in tokens) for name in self.tokens}

    def owner(self, target: Target, group: Group) -> int:
        """The process that quantizes a layer."""
        return self.targets.index(target) % group.size

    def of(self, target: Target) -> StackStatistics:
        """The statistics of one layer, as a stack of one matrix."""
        drift = self.drift[target.name][None] if self.drift else None
        tokens = torch.tensor([self.tokens[target.name]], device=self.hessian[target.name].device)
        return StackStatistics(tokens, self.hessian[target.name][None], None, 0, drift)
