"""A packed record whose scales and levels can be differentiated: codes, zero points and trits stay fixed.

A scale is s0 * exp(t) with s0 the stored scale and t the tuned parameter: steps of t are relative, and no scale changes
its sign. The forward pass rounds to the dtype that is stored and the gradient passes the rounding as if it were not
there (straight-through; Bengio et al., arXiv 1308.3432), so what is tuned is what is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..formats import IntFormat, IntMatrix, Matrix, PackedTensor, TernaryFormat, TernaryMatrix
from .unpack import unpack

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded to `dtype`, in its own dtype; the gradient is that of `value`."""
    return value if dtype == value.dtype else _Round.apply(value, dtype)


class _IntWeight(torch.autograd.Function):
    """scale (..., G), codes uint8 (..., G, w), zero (..., G) or (1,) -> (..., G, w). Saves the codes, not the
    weights."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, zero)
        return (codes.to(scale.dtype) - zero.to(scale.dtype).unsqueeze(-1)).mul_(scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, zero = ctx.saved_tensors
        grad = grads[0]
        return (codes.to(grad.dtype) - zero.to(grad.dtype).unsqueeze(-1)).mul_(grad).sum(-1), None, None


class _TernaryWeight(torch.autograd.Function):
    """levels (..., N, 2) [low, high] or (..., N, 1) [high], trits int8 (..., N, K) -> (..., N, K)."""

    @staticmethod
    def forward(ctx: Any, levels: torch.Tensor, trits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(trits)
        ctx.single = levels.shape[-1] == 1
        high = levels[..., -1:]
        low = -high if ctx.single else levels[..., :1]
        return torch.where(trits > 0, high, torch.where(trits < 0, low, torch.zeros_like(high)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (trits,) = ctx.saved_tensors
        grad = grads[0]
        high = (grad * (trits > 0)).sum(-1)
        low = (grad * (trits < 0)).sum(-1)
        return ((high - low).unsqueeze(-1) if ctx.single else torch.stack([low, high], dim=-1)), None


class _Part(nn.Module):
    """The matrices of one format of a record: `index` are their numbers in it."""

    index: torch.Tensor
    base: torch.Tensor
    codes: torch.Tensor
    zero: torch.Tensor

    def __init__(self, format: IntFormat | TernaryFormat, index: list[int], matrices: list[Matrix]) -> None:
        super().__init__()
        self.format = format
        self.register_buffer("index", torch.tensor(index))
        rows, self.cols = matrices[0].shape
        if isinstance(format, IntFormat):
            self.stored = _DTYPES[format.scale_dtype]
            width = format.group or self.cols
            groups = -(-self.cols // width)
            codes = np.stack([m.codes for m in matrices if isinstance(m, IntMatrix)])
            codes = np.pad(codes, ((0, 0), (0, 0), (0, groups * width - self.cols)))
            self.register_buffer("codes", torch.from_numpy(codes.reshape(len(matrices), rows, groups, width)))
            base = np.stack([m.scales for m in matrices if isinstance(m, IntMatrix)])
            if format.zero_point:
                zeros = np.stack([m.zeros for m in matrices if isinstance(m, IntMatrix) and m.zeros is not None])
                zero = torch.from_numpy(zeros.astype(np.float32))
            else:
                zero = torch.tensor([2.0 ** (format.bits - 1)])
            self.register_buffer("zero", zero + format.zero_offset)
        else:
            self.stored = torch.bfloat16
            self.register_buffer(
                "codes", torch.from_numpy(np.stack([m.trits for m in matrices if isinstance(m, TernaryMatrix)]))
            )
            base = np.stack([m.levels for m in matrices if isinstance(m, TernaryMatrix)])
        self.register_buffer("base", torch.from_numpy(base))
        self.change = nn.Parameter(torch.zeros(base.shape))

    def scales(self) -> torch.Tensor:
        """Scales (e, N, G) or levels (e, N, 1 or 2), as they would be stored."""
        return rounded(self.base * self.change.exp(), self.stored)

    def forward(self) -> torch.Tensor:
        """The weights (e, N, K)."""
        if isinstance(self.format, IntFormat):
            return _IntWeight.apply(self.scales(), self.codes, self.zero).flatten(-2)[..., : self.cols]
        return _TernaryWeight.apply(self.scales(), self.codes)

    def matrix(self, source: Matrix, scales: np.ndarray) -> Matrix:
        if isinstance(source, IntMatrix):
            return IntMatrix(source.format, source.codes, scales, source.zeros)
        return TernaryMatrix(source.format, source.trits, scales)


class TunableStack(nn.Module):
    """A record of E matrices (N, K) of any formats, with one tunable number per scale or level."""

    def __init__(self, packed: PackedTensor, tensor: str = "") -> None:
        """Raises as `unpack`."""
        super().__init__()
        self.tensor = tensor
        by_format: dict[Any, list[int]] = {}
        matrices = unpack(packed, tensor)
        for index, matrix in enumerate(matrices):
            by_format.setdefault(matrix.format, []).append(index)
        self.parts = nn.ModuleList(
            _Part(format, index, [matrices[i] for i in index]) for format, index in by_format.items()
        )

    def forward(self) -> torch.Tensor:
        """All weights (E, N, K)."""
        weights = [part() for part in self.parts]
        if len(weights) == 1:
            return weights[0]
        order = torch.cat([part.index for part in self.parts]).argsort()  # type: ignore[misc]
        return torch.cat(weights).index_select(0, order)

    @torch.no_grad()
    def repack(self, packed: PackedTensor) -> list[Matrix]:
        """The matrices of `packed`, the record that this was made from, with the tuned scales and levels."""
        matrices = unpack(packed, self.tensor)
        for part in self.parts:
            assert isinstance(part, _Part)
            scales = part.scales().to("cpu", torch.float32).numpy()
            for at, index in enumerate(part.index.tolist()):
                matrices[index] = part.matrix(matrices[index], np.ascontiguousarray(scales[at]))
        return matrices
