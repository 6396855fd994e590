"""All experts of one layer, with their weights packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import QmoeError
from ..formats import PackedTensor
from .gating import recognize
from .ops import dequantize, experts, grouped_linear
from .packed import PackedModule, PackedShape, placeholder

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class PackedExperts(PackedModule):
    """Stands in for a fused experts module of transformers 5 (anything under `use_experts_implementation`).

    Weights are the packed uint8 buffers `gate_up_proj_qmoe` (E, 2I, H) (`up_proj_qmoe` (E, I, H) where there is no
    gate) and `down_proj_qmoe` (E, H, I). Everything else comes from the module it replaces: biases under their own
    names, activation, limits, and above all that class's own `_apply_gate`, so a family's way of gating (halves or
    interleaved, clamped or not) is never written a second time.

    Where the gating is one that the fused kernels have (`gating.recognize`), a layer is one call; otherwise, and where
    gradients are wanted, its own code runs between two grouped products. `compute` says how products are computed, see
    `layouts.COMPUTE`; "stored" is never fused.

    forward works under `torch.compile(fullgraph=True)`: no shape depends on data. Its result does not depend on the
    order in which experts run: each token's contributions are summed in the order of its choices, in float32.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Any
    post_expert_norm: Any

    def __init__(self, template: nn.Module, shapes: Mapping[str, PackedShape], name: str = "") -> None:
        """
        Args:
            template: the experts module to stand in for; may be on the meta device. Its attributes, biases and children
                are taken over (not copied), its weights are not.
            shapes: `{"gate_up_proj" or "up_proj": PackedShape, "down_proj": PackedShape}`, always (E, out, in).
            name: runtime name of the module, for errors.

        Raises:
            QmoeError: E_LAYOUT where `template` is not such a module or `shapes` names other tensors; E_SHAPE where
                they disagree.
        """
        super().__init__()
        for attribute in ("has_gate", "has_bias", "is_transposed", "_apply_gate"):
            if not hasattr(template, attribute):
                raise QmoeError(
                    "E_LAYOUT",
                    "not a fused experts module of transformers 5",
                    tensor=name,
                    actual=type(template).__name__,
                )
        self.first = "gate_up_proj" if template.has_gate else "up_proj"
        if set(shapes) != {self.first, "down_proj"}:
            raise QmoeError(
                "E_LAYOUT",
                "packed tensors of an experts module",
                tensor=name,
                expected=[self.first, "down_proj"],
                actual=sorted(shapes),
            )
        for projection, shape in shapes.items():
            weight = getattr(template, projection, None)
            if weight is None:
                raise QmoeError("E_LAYOUT", f"the experts module has no {projection}", tensor=name)
            experts, rows, cols = weight.shape
            expected = (experts, cols, rows) if template.is_transposed else (experts, rows, cols)
            actual = (shape.experts, shape.rows, shape.cols)
            if actual != expected:
                raise QmoeError(
                    "E_SHAPE",
                    "module and packed shape (E, N, K)",
                    tensor=f"{name}.{projection}_qmoe",
                    expected=expected,
                    actual=actual,
                )
        self.__dict__.update({k: v for k, v in template.__dict__.items() if k not in _MODULE_ATTRIBUTES})
        for key, parameter in template.named_parameters(recurse=False):
            if key not in _WEIGHTS:
                self.register_parameter(key, parameter)
        for key, buffer in template.named_buffers(recurse=False):
            self.register_buffer(key, buffer, persistent=key not in template._non_persistent_buffers_set)
        for key, child in template.named_children():
            self.add_module(key, child)
        self.template_class: Any = type(template)
        self.gating = None if getattr(template, "has_post_expert_norm", False) else recognize(template)
        self.compute = "auto"
        self.shapes = dict(shapes)
        self.num_experts = shapes["down_proj"].experts
        for projection, shape in shapes.items():
            self.register_buffer(f"{projection}_qmoe", shape.buffer())
            setattr(self, projection, placeholder(*getattr(template, projection).shape))

    @classmethod
    def from_packed(cls, template: nn.Module, packed: Mapping[str, PackedTensor]) -> PackedExperts:
        """A module that holds `packed` instead of `template`'s weights."""
        shapes = {key: PackedShape(p.experts, p.rows, p.cols, p.nbytes) for key, p in packed.items()}
        module = cls(template, shapes)
        for key, tensor in packed.items():
            setattr(module, f"{key}_qmoe", torch.from_numpy(tensor.data))
        return module

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run each token through its chosen experts and add up the results.

        Args:
            hidden_states: (T, H) float32, bfloat16 or float16.
            top_k_index: (T, k) int64. Ids outside [0, E), which expert parallelism uses for other ranks' experts, add
                nothing.
            top_k_weights: (T, k) routing weights.

        Returns:
            (T, H) of `hidden_states`' dtype.
        """
        wants_gradient = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        self.settle()
        fused = self.gating is not None and self.compute != "stored"
        if fused and not wants_gradient:
            return self._fused(hidden_states, top_k_index, top_k_weights)
        tokens, top_k = top_k_index.shape
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        # offsets[e] = how many rows belong to experts before e; rows of ids outside [0, E) end up before the first or
        # after the last.
        offsets = torch.searchsorted(ids, torch.arange(self.num_experts + 1, device=ids.device, dtype=ids.dtype))
        states = hidden_states.index_select(0, order // top_k)  # (T k, H)
        states = self._project(self.first, states, ids, offsets)
        states = self.template_class._apply_gate(self, states) if self.has_gate else self.act_fn(states)
        states = self._project("down_proj", states, ids, offsets)
        if getattr(self, "has_post_expert_norm", False):
            states = self.post_expert_norm(states)
        weights = top_k_weights.reshape(-1).index_select(0, order).float()
        weights = weights.masked_fill((ids < 0) | (ids >= self.num_experts), 0.0)
        weighted = states.float() * weights.unsqueeze(-1)
        # Back to token order and summed choice by choice: unlike index_add, the same on every device and in every run.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * top_k, device=order.device))
        total = weighted.index_select(0, back).view(tokens, top_k, weighted.shape[-1]).sum(1)
        return total.to(hidden_states.dtype)

    def row_order(self, tensor: str) -> str:
        return self.gating.order if self.gating is not None and tensor == self.first else "plain"

    def _fused(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self.gating is not None
        names = (self.first, "down_proj")
        packed = [getattr(self, f"{name}_qmoe") for name in names]
        biases = [getattr(self, f"{name}_bias") if self.has_bias else None for name in names]
        return experts(
            hidden_states, index, weights, packed[0], packed[1], self.gating, biases[0], biases[1], self.compute
        )

    def _project(self, projection: str, states: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        packed = getattr(self, f"{projection}_qmoe")
        out = grouped_linear(states.contiguous(), packed, offsets, self.shapes[projection].rows, self.compute)
        if self.has_bias:
            bias = getattr(self, f"{projection}_bias")
            out = out + bias.index_select(0, ids.clamp(0, self.num_experts - 1)).to(out.dtype)
        return out

    def dequantize(self, projection: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One projection of all experts, dense, in the layout of the module that this one replaced."""
        shape = self.shapes[projection]
        packed = getattr(self, f"{projection}_qmoe")
        dense = torch.stack([dequantize(packed, e, shape.rows, shape.cols, dtype) for e in range(shape.experts)])
        return dense.transpose(1, 2).contiguous() if self.is_transposed else dense

    def extra_repr(self) -> str:
        parts = [f"{k}=({s.experts}, {s.rows}, {s.cols}) {s.format}" for k, s in self.shapes.items()]
        return f"{self.template_class.__name__}, " + ", ".join(parts)
