"""The inner loops of `feedback` and of `grids` on a CPU, by the core: torch would take dozens of passes over memory a
column. Results depend neither on the number of threads (torch's) nor on the instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _C
from . import feedback_fields as fields

if TYPE_CHECKING:
    from .feedback import Grid
    from .grids import IntGrid, TernaryGrid

MAX_GROUP = 1 << 30  # columns of a group whose grid `choose_grid` finds: whole rows too


def usable(weight: torch.Tensor) -> bool:
    """Whether these loops can read `weight`. They know float32 only, which everything but tests of the twins is."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


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
    """`feedback._round_block`: same arguments (those of `feedback_fields.round_block`), and the same bits for an
    `IntGrid` or a `TernaryGrid`. Of `residual` and `codes` the block's columns are rewritten.

    Raises:
        QmoeError: as `feedback_fields.round_block`; `E_NO_KERNEL` for an instruction set that is not there.
    """
    call = fields.round_block(weight, target, coefficients, precision, grid, columns, codes, residual)
    _C.round_block(call.of, call.grid, torch.get_num_threads())


def choose_grid(grid: IntGrid, target: torch.Tensor, precision: torch.Tensor, group: int) -> None:
    """`IntGrid._choose` for one group of columns, which may be whole rows: writes `grid.scale` and `grid.zero` of that
    group. Sums are taken in another order than torch does, so a tie may fall the other way.

    Raises:
        QmoeError: as `round_block`.
    """
    call = fields.choose_grid(grid, target, precision, group)
    _C.choose_grid(call.of, call.grid, torch.get_num_threads())


def ternary_sums(grid: TernaryGrid, weight: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of weights (E, N, K) float32 without feedback, summed up in one pass; precision (E, K) float32.

    Returns:
        (E, N, 4) float32: of the codes -1 the sum of precision * weight and of precision, then of the codes 1; and
        (E, 3) int32: how many codes are -1, 0 and 1.

    Raises:
        QmoeError: as `round_block`.
    """
    call, sums, counts = fields.ternary_sums(grid, weight, precision)
    _C.ternary_sums(call.of, torch.get_num_threads())
    return sums, counts
