"""What the ops over packed records do on a CUDA device.

A device holds a record's run-time layout and not the record: int matrices as the tiles of their kernels, ternary ones
as streams, others as stored. The record itself may stay in CPU memory (`PackedModule` sees to that), so that weights
are on the device once.

Up to `LINEAR_TOKENS` of a linear layer and `MOST_CHOICES` of experts are multiplied by the packed weights. More tokens,
float32 activations, layers whose projections differ in kind, and matrices without a kernel of their own (int with
groups of 16 columns or float32 scales, records of several kinds) decode one matrix at a time and leave the product to
torch; which experts those are has to be known on the host, so that such a call cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import torch

from .. import _C
from ..errors import QmoeError
from .gating import Gating
from .layouts import DTYPES, cached

LINEAR_TOKENS = 1024  # up to here packed weights are multiplied; beyond, decoding them once is as fast
MOST_CHOICES = 65535  # of experts, in one call of the kernels (kMostChoicesOfMany of qmoe/cuda.h)


class Stack:
    """A record's E matrices (N, K) on one device.

    Attributes:
        weights: the layout of `qmoe/cuda.h`'s products, (bytes,) uint8, or None where there is none.
        matrix: what the host knows of it.
    """

    def __init__(self, packed: torch.Tensor, order: str, device: torch.device) -> None:
        """
        Args:
            packed: (nbytes,) uint8, anywhere; not kept, except that `record` is it where it is on `device` already.
            order: of the rows: "plain", or "halves" or "interleaved" for gate and up.

        Raises:
            QmoeError: what the record's parser refuses; E_NO_KERNEL without libqmoe_cuda; E_SHAPE for an odd number of
                rows in a gated order.
        """
        data = packed.detach().contiguous().numpy(force=True)
        info = _C.inspect_record(data)
        self.experts, self.rows, self.cols = info["experts"], info["rows"], info["cols"]
        self.device = device
        self.weights: torch.Tensor | None = None
        with torch.cuda.device(device):
            self.matrix = _matrix_of(data, order)
            if isinstance(self.matrix, _C.CudaTernary):
                self.weights = torch.from_numpy(self.matrix.take()).to(device)
            else:
                record = packed.detach().contiguous().to(device)
                if self.matrix is not None:
                    self.weights = torch.empty(self.matrix.bytes, dtype=torch.uint8, device=device)
                    pointers = record.data_ptr(), self.weights.data_ptr()
                    self.matrix.prepack(*pointers, self.matrix.bytes, _stream())
                else:
                    self.record, self.decoder = record, _C.CudaRecord(data)
                    tables = np.stack([self.decoder.table(e).view(np.int32) for e in range(self.experts)])
                    self.tables = torch.from_numpy(tables).to(device)
            # Products read weights before the kernel before them has ended, and `packed` may be freed.
            torch.cuda.current_stream().synchronize()

    def dense(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """(N, K) of float32, bfloat16 or float16 on the device, rows in the record's order."""
        out = torch.empty(self.rows, self.cols, dtype=dtype, device=self.device)
        with torch.cuda.device(self.device):
            if self.matrix is not None and self.weights is not None:
                self.matrix.unpack(self.weights.data_ptr(), expert, out.data_ptr(), DTYPES[dtype], _stream())
            else:
                table = self.tables[expert].data_ptr() if self.tables.numel() else 0
                pointers = self.record.data_ptr(), table, out.data_ptr()
                self.decoder.dequantize(expert, *pointers, DTYPES[dtype], _stream())
        return out


def _matrix_of(data: np.ndarray, order: str) -> _C.CudaInt | _C.CudaTernary | None:
    """The layout that products have for a record; None where they have none."""
    try:
        return _C.CudaInt(data, order)
    except QmoeError as error:
        if error.code != "E_NO_KERNEL":
            raise
    try:
        return _C.CudaTernary(data, order, len(os.sched_getaffinity(0)))
    except QmoeError as error:
        if error.code != "E_NO_KERNEL":
            raise
    return None


def stack_of(packed: torch.Tensor, order: str, device: torch.device) -> Stack:
    """The record on a device, made at first use and kept while `packed`'s memory is there."""
    return cached(packed, order, str(device), lambda: Stack(packed, order, device))


def grouped_linear(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str = "auto"
) -> torch.Tensor:
    """`ops.grouped_linear`; offsets are read by the host."""
    _check_compute(compute)
    stack = _stack_for(x, packed, out_features)
    out = x.new_zeros(x.shape[0], out_features)
    for expert, begin, end in _groups(offsets, stack.experts, x.shape[0]):
        torch.mm(x[begin:end], stack.dense(expert, x.dtype).T, out=out[begin:end])
    return out


def grouped_linear_backward(
    grad: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, in_features: int
) -> torch.Tensor:
    """`ops.grouped_linear`'s gradient with respect to x."""
    stack = stack_of(packed, "plain", grad.device)
    result = grad.new_zeros(grad.shape[0], in_features)
    for expert, begin, end in _groups(offsets, stack.experts, grad.shape[0]):
        torch.mm(grad[begin:end], stack.dense(expert, grad.dtype), out=result[begin:end])
    return result


def linear(x: torch.Tensor, packed: torch.Tensor, out_features: int, compute: str = "auto") -> torch.Tensor:
    """`ops.linear`."""
    _check_compute(compute)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    stack = _stack_for(rows, packed, out_features)
    if stack.experts != 1:
        raise QmoeError("E_SHAPE", "a linear layer is a record of one matrix", expected=1, actual=stack.experts)
    matrix = stack.matrix
    if matrix is None or stack.weights is None or x.dtype == torch.float32 or len(rows) > LINEAR_TOKENS:
        return torch.nn.functional.linear(x, stack.dense(0, x.dtype))
    out = x.new_empty(len(rows), out_features)
    with torch.cuda.device(x.device):
        workspace = torch.empty(matrix.linear_workspace(len(rows)), dtype=torch.uint8, device=x.device)
        pointers = stack.weights.data_ptr(), rows.data_ptr(), 0, out.data_ptr()
        room = workspace.data_ptr(), workspace.numel()
        matrix.linear(*pointers, len(rows), DTYPES[x.dtype], _stream(), *room)
    return out.view(*x.shape[:-1], out_features)


def experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    first_bias: torch.Tensor | None, second_bias: torch.Tensor | None, order: str, activation: str, clamped: bool,
    alpha: float, limit: float, compute: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`ops.experts`: a few launches for all experts, or expert by expert where there are no kernels for that.

    Raises:
        QmoeError: E_VALUE for ids, weights or biases on another device than x, where their addresses mean nothing;
            E_SHAPE for projections or biases that do not fit.
    """
    _check_compute(compute)
    for name, tensor in (("ids", ids), ("weights", weights), ("biases", first_bias), ("biases", second_bias)):
        if tensor is not None and tensor.device != x.device:
            raise QmoeError("E_VALUE", f"{name} of experts and activations differ in device", expected=x.device,
                            actual=tensor.device)  # fmt: skip
    stacks = stack_of(first, order, x.device), stack_of(second, "plain", x.device)
    if (stacks[0].cols, stacks[1].rows) != (x.shape[1], x.shape[1]):
        actual = (stacks[0].cols, stacks[1].rows)
        raise QmoeError("E_SHAPE", "experts and hidden size", expected=(x.shape[1],) * 2, actual=actual)
    for stack, bias in zip(stacks, (first_bias, second_bias), strict=True):
        if bias is not None and tuple(bias.shape) != (stack.experts, stack.rows):
            raise QmoeError("E_SHAPE", "biases of experts", expected=(stack.experts, stack.rows),
                            actual=tuple(bias.shape))  # fmt: skip
    gating = Gating(order, activation, clamped, alpha, limit)
    biases = [None if bias is None else bias.to(x.dtype).contiguous() for bias in (first_bias, second_bias)]
    at_once = ids.numel() <= MOST_CHOICES and x.dtype != torch.float32
    alike = stacks[0].matrix is not None and type(stacks[0].matrix) is type(stacks[1].matrix)
    if at_once and alike:
        return _experts_at_once(x.contiguous(), ids.contiguous(), weights, stacks, gating, biases)
    return _experts_in_turn(x, ids, weights, stacks, gating, biases)


def _experts_at_once(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stacks: tuple[Stack, Stack], gating: Gating,
    biases: list[torch.Tensor | None],
) -> torch.Tensor:  # fmt: skip
    first, second = stacks
    assert first.weights is not None and second.weights is not None
    gate = gating.activation, gating.clamped, gating.alpha, gating.limit
    layer: _C.CudaIntExperts | _C.CudaTernaryExperts
    if isinstance(first.matrix, _C.CudaTernary):
        assert isinstance(second.matrix, _C.CudaTernary)
        layer = _C.CudaTernaryExperts(first.matrix, second.matrix, *gate)
    else:
        assert isinstance(first.matrix, _C.CudaInt) and isinstance(second.matrix, _C.CudaInt)
        layer = _C.CudaIntExperts(first.matrix, second.matrix, *gate)
    pointers = [0 if bias is None else bias.data_ptr() for bias in biases]
    weights = weights.contiguous() if weights.dtype in DTYPES else weights.float()
    tokens, top_k = ids.shape
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        workspace = torch.empty(layer.workspace(tokens, top_k), dtype=torch.uint8, device=x.device)
        layer.run(
            first.weights.data_ptr(), second.weights.data_ptr(), pointers[0], pointers[1],
            x.data_ptr(), DTYPES[x.dtype], tokens, ids.data_ptr(), weights.data_ptr(), DTYPES[weights.dtype], top_k,
            out.data_ptr(), workspace.data_ptr(), workspace.numel(), _stream(),
        )  # fmt: skip
    return out


def _experts_in_turn(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stacks: tuple[Stack, Stack], gating: Gating,
    biases: list[torch.Tensor | None],
) -> torch.Tensor:  # fmt: skip
    tokens, top_k = ids.shape
    count = stacks[0].experts
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(count + 1, device=x.device))
    rows = x.index_select(0, order // top_k)
    results = torch.zeros(tokens * top_k, x.shape[1], dtype=torch.float32, device=x.device)
    for expert, begin, end in _groups(offsets, count, len(rows)):
        bias = [None if b is None else b[expert] for b in biases]
        states = torch.nn.functional.linear(rows[begin:end], stacks[0].dense(expert, x.dtype), bias[0])
        states = torch.nn.functional.linear(gating(states), stacks[1].dense(expert, x.dtype), bias[1])
        chosen = order[begin:end]
        results[chosen] = states.float() * weights.reshape(-1)[chosen].float().unsqueeze(-1)
    # Summed choice by choice: unlike index_add, the same in every run.
    return results.view(tokens, top_k, -1).sum(1).to(x.dtype)


def _groups(offsets: torch.Tensor, experts: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Experts that have rows, and which: (expert, begin, end)."""
    bounds = offsets.tolist()
    if len(bounds) != experts + 1:
        raise QmoeError("E_SHAPE", "offsets of experts", expected=experts + 1, actual=len(bounds))
    if bounds != sorted(bounds) or not 0 <= bounds[0] <= bounds[-1] <= rows:
        raise QmoeError("E_VALUE", "offsets must ascend within the rows", expected=f"0..{rows}", actual=bounds[:4])
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            yield expert, begin, end


def _stack_for(x: torch.Tensor, packed: torch.Tensor, out_features: int) -> Stack:
    stack = stack_of(packed, "plain", x.device)
    if (stack.rows, stack.cols) != (out_features, x.shape[-1]):
        actual = (stack.rows, stack.cols)
        raise QmoeError("E_SHAPE", "layer and packed record", expected=(out_features, x.shape[-1]), actual=actual)
    return stack


def _check_compute(compute: str) -> None:
    if compute not in ("auto", "float"):
        raise QmoeError("E_NO_KERNEL", "this way to compute is the CPU's", expected=["auto", "float"], actual=compute)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
