"""The inner loops of `feedback` and of `grids` on a GPU, by libqmoe_cuda.

No kernel call waits for the device, and each can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .. import _C
from ..errors import QmoeError
from . import feedback_fields as fields

if TYPE_CHECKING:
    from .feedback import Grid
    from .grids import IntGrid, TernaryGrid

MAX_GROUP = 128  # columns of a group whose grid `choose_grid` finds


@functools.cache
def _library() -> bool:
    return bool(_C.cuda_info()["library"])


def usable(weight: torch.Tensor) -> bool:
    """Whether the kernels run on the device that holds `weight`."""
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
    """`feedback._round_block` in one launch: same arguments (those of `feedback_fields.round_block`), and the same bits
    for an `IntGrid` or a `TernaryGrid`. Of `residual` and `codes` the block's columns are rewritten.

    Raises:
        QmoeError: as `feedback_fields.round_block`; `E_NO_KERNEL` without libqmoe_cuda or for tensors elsewhere.
    """
    on_gpu(weight)
    call = fields.round_block(weight, target, coefficients, precision, grid, columns, codes, residual)
    with torch.cuda.device(weight.device):
        _C.cuda_round_block(call.of, call.grid, torch.cuda.current_stream().cuda_stream)


def choose_grid(grid: IntGrid, target: torch.Tensor, precision: torch.Tensor, group: int) -> None:
    """`IntGrid._choose` for one group of at most 128 columns, in one launch: writes `grid.scale` and `grid.zero` of
    that group. Sums are taken in another order than torch does, so a tie may fall the other way.

    Raises:
        QmoeError: as `round_block`.
    """
    on_gpu(target)
    if not 0 < target.shape[2] <= MAX_GROUP:
        raise QmoeError("E_SHAPE", "columns of a group", expected=f"1 to {MAX_GROUP}", actual=target.shape[2])
    call = fields.choose_grid(grid, target, precision, group)
    with torch.cuda.device(target.device):
        _C.cuda_choose_grid(call.of, call.grid, torch.cuda.current_stream().cuda_stream)


def ternary_sums(grid: TernaryGrid, weight: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of weights (E, N, K) float32 without feedback, summed up in one pass; precision (E, K) float32.

    Returns:
        (E, N, 4) float32: of the codes -1 the sum of precision * weight and of precision, then of the codes 1; and
        (E, 3) int32: how many codes are -1, 0 and 1.

    Raises:
        QmoeError: as `round_block`.
    """
    on_gpu(weight)
    call, sums, counts = fields.ternary_sums(grid, weight, precision)
    with torch.cuda.device(weight.device):
        _C.cuda_ternary_sums(call.of, torch.cuda.current_stream().cuda_stream)
    return sums, counts


def on_gpu(tensor: torch.Tensor) -> None:
    """Raises `E_NO_KERNEL` for a tensor elsewhere."""
    if not tensor.is_cuda:
        raise QmoeError("E_NO_KERNEL", "cuda: not on a CUDA device", actual=str(tensor.device))


def reserve_host(sizes: Iterable[int], device: torch.device | str) -> None:
    """Page-locked memory for `to_host`, of so many bytes each: to lock it takes a GPU longer than to fill it. It stays
    with torch's allocator."""
    with torch.cuda.device(device):
        kept = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        kept.clear()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU. From a GPU it goes through page-locked memory, many times as fast as into fresh pages."""
    if not tensor.is_cuda:
        return tensor.cpu()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor)
