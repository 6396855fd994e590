"""torch ops over packed records: `qmoe::linear`, `qmoe::grouped_linear`, `qmoe::experts`, `qmoe::dequantize`.

The ops are the only way from torch to the kernels. They take the packed bytes as a plain uint8 tensor, so a packed
layer is an ordinary buffer that saves, loads and moves like any other, and they have fake kernels, so
`torch.compile(fullgraph=True)` and export see them as opaque calls with known output shapes. Defined with
`torch.library.define` instead of `custom_op`: the latter adds tens of microseconds per call, which at batch 1 is as
long as the kernel itself.

Gradients flow to the activations (by decoding one expert at a time: correct, not fast); packed weights have none.

A device without a kernel is an `E_NO_KERNEL` error, never a silent detour through another device.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .. import _C
from ..errors import QmoeError
from . import cuda
from .gating import Gating
from .layouts import COMPUTE, DTYPES, layout_of, precision
from .tuning import load as load_tuning

load_tuning()

torch.library.define(
    "qmoe::grouped_linear",
    '(Tensor x, Tensor packed, Tensor offsets, int out_features, str compute="auto") -> Tensor',
)
torch.library.define(
    "qmoe::grouped_linear_backward", "(Tensor grad, Tensor packed, Tensor offsets, int in_features) -> Tensor"
)
torch.library.define("qmoe::linear", '(Tensor x, Tensor packed, int out_features, str compute="auto") -> Tensor')
torch.library.define(
    "qmoe::experts",
    "(Tensor x, Tensor ids, Tensor weights, Tensor first, Tensor second, Tensor? first_bias, Tensor? second_bias,"
    ' str order, str activation, bool clamped, float alpha, float limit, str compute="auto") -> Tensor',
)
torch.library.define("qmoe::dequantize", "(Tensor packed, int expert, int rows, int cols, ScalarType dtype) -> Tensor")


def grouped_linear(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str = "auto"
) -> torch.Tensor:
    """Rows of `x` times the transposed weight of their expert.

    Args:
        x: (T, K) float32, bfloat16 or float16, rows sorted by expert.
        packed: (nbytes,) uint8, a packed record of E matrices (N, K).
        offsets: (E + 1,) int64, ascending; rows offsets[e]:offsets[e + 1] use expert e.
        out_features: N.
        compute: "auto", "int8", "float" or "stored"; see `layouts.COMPUTE`.

    Returns:
        (T, N) of `x`'s dtype, accumulated in float32. Rows outside [offsets[0], offsets[E]) are zero.

    Raises:
        QmoeError: E_DTYPE, E_SHAPE (shapes and record disagree), E_VALUE (bad offsets), E_NO_KERNEL (device), or what
            the record's parser refuses.
    """
    return torch.ops.qmoe.grouped_linear(x, packed, offsets, out_features, compute)


def linear(x: torch.Tensor, packed: torch.Tensor, out_features: int, compute: str = "auto") -> torch.Tensor:
    """`x` (..., K) times the transposed weight (N, K) of a record with one matrix -> (..., N) of `x`'s dtype."""
    return torch.ops.qmoe.linear(x, packed, out_features, compute)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    gating: Gating,
    first_bias: torch.Tensor | None = None,
    second_bias: torch.Tensor | None = None,
    compute: str = "auto",
) -> torch.Tensor:
    """A layer's experts in one call: out[t] = sum over j of weights[t, j] * second(gating(first(x[t]))) of ids[t, j].

    Args:
        x: (T, H) float32, bfloat16 or float16.
        ids: (T, k) int64; ids outside [0, E) add nothing.
        weights: (T, k) routing weights, used as float32.
        first: (nbytes,) uint8, a record of E matrices (2 I, H), or (I, H) without a gate.
        second: (nbytes,) uint8, a record of E matrices (H, I).
        gating: what happens between the two.
        first_bias, second_bias: (E, 2 I or I) and (E, H), used as float32.
        compute: "auto", "int8" or "float"; the fused kernels have no "stored".

    Returns:
        (T, H) of `x`'s dtype; choices are added in their order, in float32. Gradients: none, see `PackedExperts`.

    Raises:
        QmoeError: E_DTYPE, E_SHAPE, E_VALUE, E_NO_KERNEL (device), or what the records' parser refuses.
    """
    return torch.ops.qmoe.experts(
        x, ids, weights, first, second, first_bias, second_bias, gating.order, gating.activation, gating.clamped,
        gating.alpha, gating.limit, compute,
    )  # fmt: skip


def dequantize(packed: torch.Tensor, expert: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrix `expert` of a record as a dense (rows, cols) tensor of `dtype`, by the scalar reference decoder."""
    return torch.ops.qmoe.dequantize(packed, expert, rows, cols, dtype)


def _check_packed(packed: torch.Tensor) -> None:
    if packed.dtype != torch.uint8:
        raise QmoeError("E_DTYPE", "packed weights must be uint8", expected=torch.uint8, actual=packed.dtype)
    if packed.dim() != 1:
        raise QmoeError("E_SHAPE", "packed weights must be 1-D", expected="(nbytes,)", actual=tuple(packed.shape))


def _check_activations(x: torch.Tensor, packed: torch.Tensor, min_dim: int = 1) -> None:
    _check_packed(packed)
    if x.dtype not in DTYPES:
        raise QmoeError("E_DTYPE", "no packed kernel for this activation type", expected=list(DTYPES), actual=x.dtype)
    if x.dim() < min_dim:
        raise QmoeError("E_SHAPE", "activations have too few dimensions", expected=min_dim, actual=tuple(x.shape))
    # A record in CPU memory serves every device: its layout there is made at first use.
    if packed.device not in (x.device, torch.device("cpu")):
        raise QmoeError("E_VALUE", "activations and weights differ in device", expected=packed.device, actual=x.device)


def _check_grouped(x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor) -> None:
    _check_activations(x, packed)
    if x.dim() != 2:
        raise QmoeError("E_SHAPE", "grouped activations must be (T, K)", expected=2, actual=tuple(x.shape))
    if offsets.dtype != torch.int64:
        raise QmoeError("E_DTYPE", "offsets must be int64", expected=torch.int64, actual=offsets.dtype)
    if offsets.dim() != 1:
        raise QmoeError("E_SHAPE", "offsets must be (E + 1,)", expected=1, actual=tuple(offsets.shape))
    if offsets.device != x.device:
        raise QmoeError("E_VALUE", "offsets and activations differ in device", expected=x.device, actual=offsets.device)


def _check_compute(compute: str, allowed: tuple[str, ...] = COMPUTE) -> None:
    if compute not in allowed:
        raise QmoeError("E_VALUE", "unknown way to compute", expected=list(allowed), actual=compute)


def _run_cpu(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str
) -> torch.Tensor:
    """The kernel call behind both linear ops: x (T, K) -> (T, N). The core checks shapes against the record, and
    offsets."""
    _check_compute(compute)
    x, packed, offsets = x.contiguous(), packed.contiguous(), offsets.contiguous()
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    activations = (offsets.data_ptr(), offsets.numel(), x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1],
                   out.data_ptr(), out_features)  # fmt: skip
    kind = precision(compute, x.dtype)
    if kind == "stored":
        _C.linear(packed.data_ptr(), packed.numel(), *activations, torch.get_num_threads())
    else:
        layout = layout_of(packed, "plain")
        _C.prepacked_linear(layout.data_ptr(), layout.numel(), *activations, kind, torch.get_num_threads())
    return out


def _grouped_linear_cpu(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str = "auto"
) -> torch.Tensor:
    _check_grouped(x, packed, offsets)
    return _run_cpu(x, packed, offsets, out_features, compute)


def _linear_cpu(x: torch.Tensor, packed: torch.Tensor, out_features: int, compute: str = "auto") -> torch.Tensor:
    _check_activations(x, packed)
    rows = x.reshape(-1, x.shape[-1])
    out = _run_cpu(rows, packed, torch.tensor([0, rows.shape[0]]), out_features, compute)
    return out.view(*x.shape[:-1], out_features)


def _check_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor,
                   second: torch.Tensor, compute: str) -> None:  # fmt: skip
    _check_activations(x, first)
    _check_activations(x, second)
    _check_compute(compute, ("auto", "int8", "float"))
    if x.dim() != 2 or ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise QmoeError(
            "E_SHAPE", "experts take x (T, H), ids (T, k) and weights (T, k)", expected=(x.shape[0], "k"),
            actual=(tuple(x.shape), tuple(ids.shape), tuple(weights.shape)),
        )  # fmt: skip
    if ids.dtype != torch.int64:
        raise QmoeError("E_DTYPE", "ids of experts must be int64", expected=torch.int64, actual=ids.dtype)


def _experts_cpu(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    first_bias: torch.Tensor | None, second_bias: torch.Tensor | None, order: str, activation: str, clamped: bool,
    alpha: float, limit: float, compute: str = "auto",
) -> torch.Tensor:  # fmt: skip
    _check_experts(x, ids, weights, first, second, compute)
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.float().contiguous()
    layouts = layout_of(first.contiguous(), order), layout_of(second.contiguous(), "plain")
    for layout, bias in zip(layouts, (first_bias, second_bias), strict=True):
        if bias is None:
            continue
        expected = _C.prepacked_shape(layout.data_ptr(), layout.numel())[:2]
        if tuple(bias.shape) != expected:
            raise QmoeError("E_SHAPE", "biases of experts", expected=expected, actual=tuple(bias.shape))
    biases = [None if bias is None else bias.float().contiguous() for bias in (first_bias, second_bias)]
    out = torch.empty_like(x)
    _C.experts(
        layouts[0].data_ptr(), layouts[0].numel(), layouts[1].data_ptr(), layouts[1].numel(),
        0 if biases[0] is None else biases[0].data_ptr(), 0 if biases[1] is None else biases[1].data_ptr(), activation,
        order != "plain", clamped, alpha,
        limit, precision(compute, x.dtype), x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], ids.data_ptr(),
        weights.data_ptr(), ids.shape[1], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _dequantize_cpu(packed: torch.Tensor, expert: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    _check_packed(packed)
    if expert < 0:
        raise QmoeError("E_VALUE", "no such expert", expected=">= 0", actual=expert)
    # Checksums are for loading; here they would cost a pass over all experts for every one that is decoded.
    weight = _C.decode_record(packed.contiguous().numpy(), expert, False)
    if weight.shape != (rows, cols):
        raise QmoeError("E_SHAPE", "layer and packed record differ", expected=(rows, cols), actual=weight.shape)
    return torch.from_numpy(weight).to(dtype)


def _grouped_linear_backward_cpu(
    grad: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, in_features: int
) -> torch.Tensor:
    _check_grouped(grad, packed, offsets)
    result = grad.new_zeros(grad.shape[0], in_features)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            weight = _dequantize_cpu(packed, expert, grad.shape[1], in_features, torch.float32)
            result[begin:end] = (grad[begin:end].float() @ weight).to(grad.dtype)
    return result


def _grouped_linear_cuda(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str = "auto"
) -> torch.Tensor:
    _check_grouped(x, packed, offsets)
    return cuda.grouped_linear(x, packed, offsets, out_features, compute)


def _grouped_linear_backward_cuda(
    grad: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, in_features: int
) -> torch.Tensor:
    _check_grouped(grad, packed, offsets)
    return cuda.grouped_linear_backward(grad, packed, offsets, in_features)


def _linear_cuda(x: torch.Tensor, packed: torch.Tensor, out_features: int, compute: str = "auto") -> torch.Tensor:
    _check_activations(x, packed)
    return cuda.linear(x, packed, out_features, compute)


def _experts_cuda(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *rest: Any
) -> torch.Tensor:
    _check_experts(x, ids, weights, first, second, rest[-1] if len(rest) == 8 else "auto")
    return cuda.experts(x, ids, weights, first, second, *rest)


def _dequantize_cuda(packed: torch.Tensor, expert: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    _check_packed(packed)
    stack = cuda.stack_of(packed, "plain", packed.device)
    if not 0 <= expert < stack.experts:
        raise QmoeError("E_VALUE", "no such expert", expected=f"0..{stack.experts - 1}", actual=expert)
    if (stack.rows, stack.cols) != (rows, cols):
        raise QmoeError("E_SHAPE", "layer and packed record differ", expected=(rows, cols),
                        actual=(stack.rows, stack.cols))  # fmt: skip
    return stack.dense(expert, dtype)


def _grouped_linear_fake(
    x: torch.Tensor, packed: torch.Tensor, offsets: torch.Tensor, out_features: int, compute: str = "auto"
) -> torch.Tensor:
    _check_grouped(x, packed, offsets)
    return x.new_empty(x.shape[0], out_features)


def _linear_fake(x: torch.Tensor, packed: torch.Tensor, out_features: int, compute: str = "auto") -> torch.Tensor:
    _check_activations(x, packed)
    return x.new_empty(*x.shape[:-1], out_features)


def _experts_fake(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *rest: Any
) -> torch.Tensor:
    _check_experts(x, ids, weights, first, second, rest[-1] if len(rest) == 8 else "auto")
    return torch.empty_like(x)


def _dequantize_fake(packed: torch.Tensor, expert: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    _check_packed(packed)
    return packed.new_empty(rows, cols, dtype=dtype)


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, offsets = inputs[:3]
    ctx.save_for_backward(packed, offsets)
    ctx.in_features = x.shape[1]


def _grouped_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    packed, offsets = ctx.saved_tensors
    return torch.ops.qmoe.grouped_linear_backward(grad, packed, offsets, ctx.in_features), None, None, None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed = inputs[:2]
    ctx.save_for_backward(packed)
    ctx.in_features = x.shape[-1]


def _linear_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    offsets = torch.arange(2, device=grad.device) * rows.shape[0]
    result = torch.ops.qmoe.grouped_linear_backward(rows, packed, offsets, ctx.in_features)
    return result.view(*grad.shape[:-1], ctx.in_features), None, None, None


for _name, _cpu, _cuda, _fake in (
    ("grouped_linear", _grouped_linear_cpu, _grouped_linear_cuda, _grouped_linear_fake),
    ("grouped_linear_backward", _grouped_linear_backward_cpu, _grouped_linear_backward_cuda, _grouped_linear_fake),
    ("linear", _linear_cpu, _linear_cuda, _linear_fake),
    ("experts", _experts_cpu, _experts_cuda, _experts_fake),
    ("dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
):
    torch.library.impl(f"qmoe::{_name}", "CPU", _cpu)
    torch.library.impl(f"qmoe::{_name}", "CUDA", _cuda)
    torch.library.register_fake(f"qmoe::{_name}", _fake)
torch.library.register_autograd("qmoe::grouped_linear", _grouped_gradient, setup_context=_save_grouped)
torch.library.register_autograd("qmoe::linear", _linear_gradient, setup_context=_save_linear)
