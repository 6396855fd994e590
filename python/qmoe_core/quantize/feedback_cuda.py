"""The inner loops of `feedback` and of `grids` on a GPU, by libqmoe_cuda.

No kernel call waits for the device, and each can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .. import _C
from ..errors import QmoeError

if TYPE_CHECKING:
    from .feedback import Grid
    from .grids import IntGrid, TernaryGrid

MAX_COLUMNS = 128  # of one block or group
_SCALE_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}


@functools.cache
def _library() -> bool:
    return bool(_C.cuda_info()["library"])


def usable(weight: torch.Tensor) -> bool:
    """Whether the kernels run on the device that holds `weight`; elsewhere torch does the same, slowly."""
    return weight.is_cuda and torch.version.cuda is not None and _library()


def round_block(
    weight: torch.Tensor,
    target: torch.Tensor,
    coefficients: torch.Tensor,
    precision: torch.Tensor,
    grid: Grid,
    columns: slice,
    codes: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """`feedback._round_block` in one launch: same arguments, and the same bits for an `IntGrid` or a `TernaryGrid`.

    Args:
        weight, residual: (E, N, K) float32 contiguous. codes: (E, N, K) int8 contiguous. Of `residual` and `codes` the
            block's columns are rewritten.
        target: (E, N, B) float32 contiguous, B <= 128. coefficients: (E, B, B) float32, any strides.
        precision: (E, B) float32.

    Raises:
        QmoeError: `E_DTYPE`, `E_SHAPE` (also for strides that the kernel does not read), `E_NO_KERNEL` without
            libqmoe_cuda or for tensors elsewhere.
    """
    from .grids import IntGrid, TernaryGrid

    experts, rows, total = weight.shape
    width = columns.stop - columns.start
    if not 0 < width <= MAX_COLUMNS or columns.start < 0 or columns.stop > total:
        raise QmoeError("E_SHAPE", "columns of a block", expected=f"1 to {MAX_COLUMNS}, within {total}", actual=columns)
    for name, tensor in (("weight", weight), ("residual", residual), ("codes", codes)):
        _check(name, tensor, torch.int8 if tensor is codes else torch.float32, (experts, rows, total), contiguous=True)
    _check("target", target, torch.float32, (experts, rows, width), contiguous=True)
    _check("coefficients", coefficients, torch.float32, (experts, width, width), any_strides=True)
    _check("precision", precision, torch.float32, (experts, width), any_strides=True)
    precision = precision.contiguous()  # the diagonal of a matrix is not
    block = {
        "experts": experts,
        "rows": rows,
        "columns": width,
        "expert_stride": rows * total,
        "row_stride": total,
        "weight": weight.data_ptr() + 4 * columns.start,
        "residual": residual.data_ptr() + 4 * columns.start,
        "codes": codes.data_ptr() + columns.start,
        "target": target.data_ptr(),
        "coefficients": coefficients.data_ptr(),
        "coefficient_expert_stride": coefficients.stride(0),
        "coefficient_row_stride": coefficients.stride(1),
        "coefficient_column_stride": coefficients.stride(2),
        "precision": precision.data_ptr(),
        "precision_stride": precision.stride(0),
    }
    if isinstance(grid, IntGrid):
        groups = grid.scale.shape[2]
        tensors = {"scale": grid.scale, "zero": grid.zero}
        for name, tensor in tensors.items():
            _check(name, tensor, torch.float32, (experts, rows, groups), contiguous=True)
        numbers = {"groups": groups, "width": grid.width, "top": grid.top, "first": columns.start}
    elif isinstance(grid, TernaryGrid):
        # Made contiguous where a stack shares one number; kept alive until the launch.
        tensors = {"low": grid.low, "high": grid.high, "price": grid.price, "bits": grid.bits}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            _check(name, tensor, torch.float32, (experts, 3) if name == "bits" else (experts, rows), contiguous=True)
        numbers = {}
    else:
        raise QmoeError("E_NO_KERNEL", "cuda: rounding to this grid", actual=type(grid).__name__)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    with torch.cuda.device(weight.device):
        _C.cuda_round_block(block, {**pointers, **numbers}, torch.cuda.current_stream().cuda_stream)


def choose_grid(grid: IntGrid, target: torch.Tensor, precision: torch.Tensor, group: int) -> None:
    """`IntGrid._choose` for one group of columns, in one launch: writes `grid.scale` and `grid.zero` of that group.

    Sums are taken in another order than torch does, so a tie may fall the other way.

    Args:
        target: (E, N, B) float32, B <= 128, rows evenly spaced. precision: (E, B) float32.

    Raises:
        QmoeError: as `round_block`.
    """
    experts, rows, groups = grid.scale.shape
    width = target.shape[2]
    if not 0 < width <= MAX_COLUMNS:
        raise QmoeError("E_SHAPE", "columns of a group", expected=f"1 to {MAX_COLUMNS}", actual=width)
    _check("target", target, torch.float32, (experts, rows, width))
    if target.stride(0) != rows * target.stride(1) and experts > 1:
        raise QmoeError("E_SHAPE", "target: rows are not evenly spaced", actual=target.stride())
    _check("precision", precision, torch.float32, (experts, width), any_strides=True)
    precision = precision.contiguous()
    _check("scale", grid.scale, torch.float32, (experts, rows, groups), contiguous=True)
    _check("zero", grid.zero, torch.float32, (experts, rows, groups), contiguous=True)
    of = {
        "experts": experts,
        "rows": rows,
        "columns": width,
        "target": target.data_ptr(),
        "target_row_stride": target.stride(1),
        "precision": precision.data_ptr(),
        "precision_stride": precision.stride(0),
    }
    into = {
        "scale": grid.scale.data_ptr(),
        "zero": grid.zero.data_ptr(),
        "groups": groups,
        "group": group,
        "top": grid.top,
        "steps": grid.steps,
        "scale_type": _SCALE_TYPES[grid.format.scale_dtype],
        "zero_point": grid.format.zero_point,
        "half_step": grid.format.half_step,
    }
    with torch.cuda.device(target.device):
        _C.cuda_choose_grid(of, into, torch.cuda.current_stream().cuda_stream)


def ternary_sums(grid: TernaryGrid, weight: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of weights (E, N, K) float32 without feedback, summed up in one pass; precision (E, K) float32.

    Returns:
        (E, N, 4) float32: of the codes -1 the sum of precision * weight and of precision, then of the codes 1; and
        (E, 3) int32: how many codes are -1, 0 and 1.

    Raises:
        QmoeError: as `round_block`.
    """
    experts, rows, columns = weight.shape
    levels = {"low": grid.low, "high": grid.high, "price": grid.price}
    tensors = {"weight": weight, "precision": precision, "bits": grid.bits, **levels}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    shapes = {"weight": (experts, rows, columns), "precision": (experts, columns), "bits": (experts, 3)}
    for name, tensor in tensors.items():
        _check(name, tensor, torch.float32, shapes.get(name, (experts, rows)), contiguous=True)
    sums = weight.new_empty((experts, rows, 4))
    counts = torch.zeros((experts, 3), dtype=torch.int32, device=weight.device)
    tensors |= {"sums": sums, "counts": counts}
    fields = {"experts": experts, "rows": rows, "columns": columns}
    fields |= {name: tensor.data_ptr() for name, tensor in tensors.items()}
    with torch.cuda.device(weight.device):
        _C.cuda_ternary_sums(fields, torch.cuda.current_stream().cuda_stream)
    return sums, counts


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU. From a GPU it goes through page-locked memory, many times as fast as into fresh pages."""
    if not tensor.is_cuda:
        return tensor.cpu()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor)


def _check(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    contiguous: bool = False,
    any_strides: bool = False,
) -> None:
    if not tensor.is_cuda:
        raise QmoeError("E_NO_KERNEL", f"cuda: {name} is not on a CUDA device", actual=str(tensor.device))
    if tensor.dtype != dtype:
        raise QmoeError("E_DTYPE", f"cuda: {name}", expected=str(dtype), actual=str(tensor.dtype))
    if tuple(tensor.shape) != shape:
        raise QmoeError("E_SHAPE", f"cuda: {name}", expected=shape, actual=tuple(tensor.shape))
    if any_strides:
        return
    if (contiguous and not tensor.is_contiguous()) or (shape[-1] > 1 and tensor.stride(-1) != 1):
        raise QmoeError("E_SHAPE", f"cuda: {name} has strides that the kernel does not read", actual=tensor.stride())
