"""The arguments of the inner loops of `feedback` and of `grids` as the kernels take them, on a CPU (`feedback_cpu`) and
on a GPU (`feedback_cuda`): checked, and turned into numbers and raw pointers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import QmoeError

if TYPE_CHECKING:
    from .feedback import Grid
    from .grids import IntGrid, TernaryGrid

MAX_COLUMNS = 128  # of one block
_SCALE_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}


@dataclass(frozen=True)
class Fields:
    """What a kernel is called with.

    Attributes:
        of: the stack; grid: what it is rounded to, where that is apart. tensors: what else pointers are of.
    """

    of: dict[str, int]
    grid: dict[str, int]
    tensors: tuple[torch.Tensor, ...]


def round_block(
    weight: torch.Tensor,
    target: torch.Tensor,
    coefficients: torch.Tensor,
    precision: torch.Tensor,
    grid: Grid,
    columns: slice,
    codes: torch.Tensor,
    residual: torch.Tensor,
) -> Fields:
    """Of `feedback._round_block`.

    Args:
        weight, residual: (E, N, K) float32 contiguous. codes: (E, N, K) int8 contiguous.
        target: (E, N, B) float32 contiguous, B <= 128. coefficients: (E, B, B) float32, any strides.
        precision: (E, B) float32, any strides. All on one device.

    Raises:
        QmoeError: `E_DTYPE`, `E_SHAPE` (also for strides that no kernel reads), `E_NO_KERNEL` for tensors on several
            devices and for grids that there is no kernel for.
    """
    from .grids import IntGrid, TernaryGrid

    experts, rows, total = weight.shape
    width = columns.stop - columns.start
    if not 0 < width <= MAX_COLUMNS or columns.start < 0 or columns.stop > total:
        raise QmoeError("E_SHAPE", "columns of a block", expected=f"1 to {MAX_COLUMNS}, within {total}", actual=columns)
    check = _Check(weight.device)
    for name, tensor in (("weight", weight), ("residual", residual), ("codes", codes)):
        check(name, tensor, (experts, rows, total), torch.int8 if tensor is codes else torch.float32, contiguous=True)
    check("target", target, (experts, rows, width), contiguous=True)
    check("coefficients", coefficients, (experts, width, width), any_strides=True)
    check("precision", precision, (experts, width), any_strides=True)
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
    numbers: dict[str, int] = {}
    if isinstance(grid, IntGrid):
        groups = grid.scale.shape[2]
        tensors = {"scale": grid.scale, "zero": grid.zero}
        for name, tensor in tensors.items():
            check(name, tensor, (experts, rows, groups), contiguous=True)
        numbers = {"groups": groups, "width": grid.width, "top": grid.top, "first": columns.start}
    elif isinstance(grid, TernaryGrid):
        # Made contiguous where a stack shares one number.
        tensors = {"low": grid.low, "high": grid.high, "price": grid.price, "bits": grid.bits}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            check(name, tensor, (experts, 3) if name == "bits" else (experts, rows), contiguous=True)
    else:
        raise QmoeError("E_NO_KERNEL", "rounding to this grid", actual=type(grid).__name__)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return Fields(block, {**pointers, **numbers}, (precision, *tensors.values()))


def choose_grid(grid: IntGrid, target: torch.Tensor, precision: torch.Tensor, group: int) -> Fields:
    """Of `IntGrid._choose` for one group of columns.

    Args:
        target: (E, N, B) float32, rows evenly spaced. precision: (E, B) float32, any strides.

    Raises:
        QmoeError: as `round_block`.
    """
    experts, rows, groups = grid.scale.shape
    width = target.shape[2]
    check = _Check(target.device)
    check("target", target, (experts, rows, width))
    if target.stride(0) != rows * target.stride(1) and experts > 1:
        raise QmoeError("E_SHAPE", "target: rows are not evenly spaced", actual=target.stride())
    check("precision", precision, (experts, width), any_strides=True)
    precision = precision.contiguous()
    check("scale", grid.scale, (experts, rows, groups), contiguous=True)
    check("zero", grid.zero, (experts, rows, groups), contiguous=True)
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
    return Fields(of, into, (precision,))


def ternary_sums(
    grid: TernaryGrid, weight: torch.Tensor, precision: torch.Tensor
) -> tuple[Fields, torch.Tensor, torch.Tensor]:
    """Of `TernaryGrid.begin`: weights (E, N, K) and precision (E, K) float32; and the tensors that are written, (E, N,
    4) float32 and (E, 3) int32.

    Raises:
        QmoeError: as `round_block`.
    """
    experts, rows, columns = weight.shape
    levels = {"low": grid.low, "high": grid.high, "price": grid.price}
    tensors = {"weight": weight, "precision": precision, "bits": grid.bits, **levels}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    shapes = {"weight": (experts, rows, columns), "precision": (experts, columns), "bits": (experts, 3)}
    check = _Check(weight.device)
    for name, tensor in tensors.items():
        check(name, tensor, shapes.get(name, (experts, rows)), contiguous=True)
    sums = weight.new_empty((experts, rows, 4))
    counts = torch.zeros((experts, 3), dtype=torch.int32, device=weight.device)
    written = {"sums": sums, "counts": counts}
    fields = {"experts": experts, "rows": rows, "columns": columns}
    fields |= {name: tensor.data_ptr() for name, tensor in (tensors | written).items()}
    return Fields(fields, {}, tuple(tensors.values())), sums, counts


@dataclass(frozen=True)
class _Check:
    """Raises unless a tensor is what a kernel reads: rows of neighbouring numbers, on `device`."""

    device: torch.device

    def __call__(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        contiguous: bool = False,
        any_strides: bool = False,
    ) -> None:
        if tensor.device != self.device:
            raise QmoeError(
                "E_NO_KERNEL", f"{name} is on another device", expected=str(self.device), actual=str(tensor.device)
            )
        if tensor.dtype != dtype:
            raise QmoeError("E_DTYPE", name, expected=str(dtype), actual=str(tensor.dtype))
        if tuple(tensor.shape) != shape:
            raise QmoeError("E_SHAPE", name, expected=shape, actual=tuple(tensor.shape))
        if any_strides:
            return
        if (contiguous and not tensor.is_contiguous()) or (shape[-1] > 1 and tensor.stride(-1) != 1):
            raise QmoeError("E_SHAPE", f"{name} has strides that no kernel reads", actual=tensor.stride())
