"""A linear layer that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import QmoeError
from ..formats import PackedTensor
from .ops import dequantize, linear
from .packed import PackedModule, PackedShape, placeholder


class PackedLinear(PackedModule):
    """`nn.Linear` with its weight (N, K) as the packed uint8 buffer `weight_qmoe`; the bias stays a plain parameter.

    The buffer is uint8, so `.to(dtype)` changes only the bias. Activations may be float32, bfloat16 or float16.
    """

    weight_qmoe: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, template: nn.Linear, shapes: Mapping[str, PackedShape], name: str = "") -> None:
        """
        Args:
            template: the layer to stand in for; its bias is taken over (not copied).
            shapes: `{"weight": PackedShape}`.
            name: runtime name of the layer, for errors.

        Raises:
            QmoeError: E_LAYOUT where `template` is no linear layer or `shapes` names other tensors; E_SHAPE where they
                disagree.
        """
        super().__init__()
        if not isinstance(template, nn.Linear) or set(shapes) != {"weight"}:
            raise QmoeError(
                "E_LAYOUT",
                "a packed linear layer needs an nn.Linear and one tensor 'weight'",
                tensor=name,
                actual=(type(template).__name__, sorted(shapes)),
            )
        shape = shapes["weight"]
        expected = (1, template.out_features, template.in_features)
        if (shape.experts, shape.rows, shape.cols) != expected:
            actual = (shape.experts, shape.rows, shape.cols)
            raise QmoeError("E_SHAPE", "layer and packed shape", tensor=name, expected=expected, actual=actual)
        self.in_features, self.out_features = template.in_features, template.out_features
        self.shapes = {"weight": shape}
        self.register_buffer("weight_qmoe", shape.buffer())
        self.register_parameter("bias", template.bias)
        self.compute = "auto"  # how products are computed; see layouts.COMPUTE
        self.weight = placeholder(self.out_features, self.in_features)

    @classmethod
    def from_packed(cls, template: nn.Linear, packed: PackedTensor) -> PackedLinear:
        """A layer that holds `packed` (E = 1) instead of `template`'s weight."""
        shape = PackedShape(packed.experts, packed.rows, packed.cols, packed.nbytes)
        layer = cls(template, {"weight": shape})
        layer.weight_qmoe = torch.from_numpy(packed.data)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        self.settle()
        out = linear(x, self.weight_qmoe, self.out_features, self.compute)
        return out if self.bias is None else out + self.bias

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a dense (N, K) tensor."""
        return dequantize(self.weight_qmoe, 0, self.out_features, self.in_features, dtype)

    def extra_repr(self) -> str:
        shape = self.shapes["weight"]
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={shape.format}"
