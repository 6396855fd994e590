"""Packed modules with tunable ones in their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..formats import PackedTensor
from ..runtime.experts import PackedExperts
from ..runtime.linear import PackedLinear
from .stacks import TunableStack

Records = Callable[[str], PackedTensor]  # by name in the checkpoint


class TunableExperts(PackedExperts):
    """Packed experts whose weights are made from tunable scales in every forward pass. Routing, gating and the order of
    summation are those of `PackedExperts`; any device that torch computes on."""

    def __init__(self, packed: PackedExperts, name: str, records: Records) -> None:
        nn.Module.__init__(self)
        own = set(self.__dict__)
        self.__dict__.update({k: v for k, v in packed.__dict__.items() if k not in own})
        for key, parameter in packed.named_parameters(recurse=False):
            self.register_parameter(key, parameter)
        for key, buffer in packed.named_buffers(recurse=False):
            if not key.endswith("_qmoe"):
                self.register_buffer(key, buffer)
        for key, child in packed.named_children():
            self.add_module(key, child)
        self.gating = None  # the fused kernels read records; here are none
        self.stacks = nn.ModuleDict(
            {key: TunableStack(records(f"{name}.{key}_qmoe"), f"{name}.{key}_qmoe") for key in packed.shapes}
        )

    def _project(self, projection: str, states: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        weights = self.stacks[projection]()
        bounds = offsets.tolist()
        most = max(b - a for a, b in itertools.pairwise(bounds))
        # One batched product starts far fewer kernels than one per expert; padding must not cost more than it saves.
        if states.is_cuda and bounds[-1] - bounds[0] == len(states) and most * self.num_experts <= 2 * len(states):
            slots = ids * most + torch.arange(len(ids), device=ids.device) - offsets[ids]
            padded = states.new_zeros(self.num_experts * most, states.shape[-1]).index_copy(0, slots, states)
            out = padded.view(self.num_experts, most, -1) @ weights.to(states.dtype).transpose(1, 2)
            out = out.flatten(0, 1).index_select(0, slots)
        else:
            parts = [states[a:b] for a, b in itertools.pairwise(bounds)]
            outs = [F.linear(part, w.to(part.dtype)) for part, w in zip(parts, weights.unbind(0), strict=True)]
            ends = (bounds[0], len(states) - bounds[-1])  # rows of ids outside [0, E)
            rows = self.shapes[projection].rows
            out = torch.cat([outs[0].new_zeros(ends[0], rows), *outs, outs[0].new_zeros(ends[1], rows)])
        if self.has_bias:
            bias = getattr(self, f"{projection}_bias")
            out = out + bias.index_select(0, ids.clamp(0, self.num_experts - 1)).to(out.dtype)
        return out


class TunableLinear(nn.Module):
    """A packed linear layer whose weight is made from tunable scales in every forward pass."""

    bias: nn.Parameter | None

    def __init__(self, packed: PackedLinear, name: str, records: Records) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.register_parameter("bias", packed.bias)
        self.weight = packed.weight  # a placeholder: model code may ask for its dtype
        self.stack = TunableStack(records(f"{name}.weight_qmoe"), f"{name}.weight_qmoe")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        return F.linear(x, self.stack()[0].to(x.dtype), self.bias)


def make_tunable(model: nn.Module, records: Records, prefix: str = "") -> None:
    """Puts tunable modules in the place of all packed ones of `model`; `prefix` comes before their names in the
    checkpoint."""
    for path, module in list(model.named_modules()):
        name = prefix + path
        if isinstance(module, PackedExperts) and not isinstance(module, TunableExperts):
            model.set_submodule(path, TunableExperts(module, name, records))
        elif isinstance(module, PackedLinear):
            model.set_submodule(path, TunableLinear(module, name, records))


def stacks_of(model: nn.Module) -> dict[str, TunableStack]:
    """All tunable records below `model`, by their names in the checkpoint."""
    return {module.tensor: module for module in model.modules() if isinstance(module, TunableStack)}
