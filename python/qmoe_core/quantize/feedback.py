"""Rounding with feedback: the one sweep that GPTQ and coordinate descent share.

Quantizing W (N, K) for inputs x with second moments H = sum of x x^T means to find Q on a grid with a small output
error tr((W - Q) H (W - Q)^T). Rows do not interact; columns do, and both classical ways of using that are the same
sweep over the columns with another coefficient matrix A: with residuals R = W - Q, column j is rounded at

    t_j = w_j + sum over i != j of r_i A_ij          (r_i of this sweep for i < j, of the sweep before for i > j)

GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304): H = U D U^T with U unit
upper triangular, A = U. A column sees only the errors of those before it, and the error is the sum of d_j (t_j -
q_j)^2: one Cholesky factorization of the flipped matrix instead of GPTQ's factorization, inversion and second
factorization.

Coordinate descent: A_ij = H_ij / H_jj. Then t_j is the minimum of the error along w_j with everything else fixed, and
rounding it changes the error by H_jj ((t_j - q_j)^2 - (t_j - old q_j)^2): each sweep can only lower it.

The sweep goes block by block, and a few blocks make a span: what lies outside of a span is one large matrix product,
what changes inside of it a small one per block, and inside a block the columns go one by one, every row for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import QmoeError
from . import inner_loops
from .products import LeftSide, product

SPAN = 512  # columns at most whose feedback from all others is one product; blocks within it are made up for
PANEL = 256  # columns per panel of a Cholesky factorization on a GPU


class Grid(Protocol):
    """Where the columns of a stack of E matrices (N, K) may be rounded to."""

    block: int  # columns per block of a sweep

    def begin_block(self, target: torch.Tensor, precision: torch.Tensor, columns: slice) -> None:
        """Choose the grid of a block before its first rounding.

        Args:
            target: (E, N, B) float32: what is about to be rounded.
            precision: (E, B) float32: weight of each column's squared error.
        """

    def refine_block(
        self, residual: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, columns: slice
    ) -> None:
        """Fit the grid of a block to the codes it has, given everything else.

        Args:
            residual: (E, N, B) float32 W - Q of the block; follows. gradient: (E, N, B) of (W - Q) H; follows.
            hessian: (E, B, B) of the block. codes: (E, N, B) int8.
        """

    def round(self, target: torch.Tensor, precision: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 (E, N) and values float32 (E, N) of one column: `target` (E, N), `precision` (E,)."""


@dataclass(frozen=True)
class Factors:
    """H = U D U^T of a stack, damped.

    Attributes:
        hessian: (E, K, K) float32, damping included. unit_upper: (E, K, K) float32 U. diagonal: (E, K) float32 of D.
    """

    hessian: torch.Tensor
    unit_upper: torch.Tensor
    diagonal: torch.Tensor

    @property
    def root(self) -> torch.Tensor:
        """(E, K, K) float32 upper triangular R with H = R R^T."""
        return self.unit_upper * self.diagonal.sqrt().unsqueeze(1)


def factorize(hessian: torch.Tensor, damping: float) -> Factors:
    """Damps and factorizes a stack of second moments.

    Args:
        hessian: (E, K, K) float32 symmetric positive semidefinite.
        damping: added to the diagonal, in units of its mean; ten times as much, and so on up to 1, where rounding made
            the matrix indefinite. An all-zero matrix becomes the identity: without inputs every weight counts alike.

    Raises:
        QmoeError: `E_VALUE` for NaN or infinite statistics.
    """
    if not all_finite(hessian):
        raise QmoeError("E_VALUE", "the calibration statistics have NaN or infinite values")
    columns = hessian.shape[2]
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += damping * mean
    diagonal += (diagonal.sum(1, keepdim=True) == 0).float()  # no damping and no input
    lower, info = _cholesky(damped.flip(1, 2))
    while bool((info != 0).any()):
        if damping >= 1:
            raise QmoeError("E_VALUE", "the calibration statistics are not positive semidefinite")
        damping = max(10 * damping, 1e-6)
        failed = info != 0
        damped[failed] = hessian[failed]
        damped[failed] += damping * torch.diag_embed(mean[failed].expand(-1, columns))
        lower[failed], info[failed] = _cholesky(damped[failed].flip(1, 2))
    root = lower.flip(1, 2)
    pivots = root.diagonal(dim1=1, dim2=2).clone()
    return Factors(damped, root.div_(pivots.unsqueeze(1)), pivots.square())


def _cholesky(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch.linalg.cholesky_ex`: lower triangles, and per matrix 0 where there is one.

    On a GPU a stack of large matrices goes panel by panel, nearly all of it in products of stacks: cuSOLVER's batched
    factorization is made for small ones.
    """
    columns = matrices.shape[2]
    if not matrices.is_cuda or columns < 4 * PANEL:
        lower, info = torch.linalg.cholesky_ex(matrices)
        return lower, info
    lower = torch.zeros_like(matrices)
    info = torch.zeros(len(matrices), dtype=torch.int32, device=matrices.device)
    for now in _blocks(columns, PANEL):
        before, below = slice(0, now.start), slice(now.stop, columns)
        panel = matrices[:, now.start :, now]
        if now.start:
            panel = torch.baddbmm(panel, lower[:, now.start :, before], lower[:, now, before].transpose(1, 2), alpha=-1)
        width = now.stop - now.start
        square, failed = torch.linalg.cholesky_ex(panel[:, :width])
        info = torch.maximum(info, failed)
        lower[:, now, now] = square
        if now.stop < columns:
            one = torch.eye(width, device=matrices.device).expand_as(square)
            inverse = torch.linalg.solve_triangular(square, one, upper=False)
            lower[:, below, now] = torch.bmm(panel[:, width:], inverse.transpose(1, 2))
    return lower, info


def retarget(weight: torch.Tensor, drift: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The weight that, on the inputs x that the compressed model sees, comes closest to the outputs of the original
    weight on the original inputs: W + W C H^-1 with C = sum of (x_original - x) x^T (E, K, K).

    (After GPTAQ, Li et al., arXiv 2504.02692: its asymmetric error, taken into the target once instead of column by
    column.)
    """
    root = factors.root
    moved = torch.linalg.solve_triangular(root, torch.bmm(weight, drift).transpose(1, 2), upper=True)
    moved = torch.linalg.solve_triangular(root.transpose(1, 2), moved, upper=False)
    return weight + moved.transpose(1, 2)


def round_with_feedback(weight: torch.Tensor, factors: Factors, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's pass: (codes int8 (E, N, K), residual W - Q float32 (E, N, K)) of float32 weights (E, N, K)."""
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    residual, upper = torch.zeros_like(weight), factors.unit_upper
    left = LeftSide(residual, grid.block, zero=True)
    for span in _spans(weight.shape[2], grid.block):
        targets = weight[:, :, span].clone()
        if span.start:
            targets += left.times(upper[:, : span.start, span])
        for columns, inside, rest in _blocks_of(span, grid.block):
            target, precision = targets[:, :, inside].contiguous(), factors.diagonal[:, columns]
            grid.begin_block(target, precision, columns)
            _round_block(weight, target, upper[:, columns, columns], precision, grid, columns, codes, residual)
            left.update(columns)
            if columns.stop < span.stop:
                behind = slice(columns.stop, span.stop)
                targets[:, :, rest].baddbmm_(residual[:, :, columns], upper[:, columns, behind])
    return codes, residual


def descend(weight: torch.Tensor, factors: Factors, grid: Grid, codes: torch.Tensor, residual: torch.Tensor) -> None:
    """One sweep of coordinate descent, in place on what `round_with_feedback` returned: per block first the grid
    (`Grid.refine_block`), then the codes."""
    hessian = factors.hessian
    curvature = hessian.diagonal(dim1=1, dim2=2)
    left = LeftSide(residual, grid.block)
    for span in _spans(weight.shape[2], grid.block):
        gradients = left.times(hessian[:, :, span])
        for columns, inside, rest in _blocks_of(span, grid.block):
            within, precision = hessian[:, columns, columns], curvature[:, columns]
            gradient, now = gradients[:, :, inside], residual[:, :, columns]
            before = now.clone()
            grid.refine_block(now, gradient, within, codes[:, :, columns], columns)
            # t_j = q_j + gradient_j / H_jj, and q_j = w_j - r_j
            target = (weight[:, :, columns] - now).addcdiv_(gradient, precision.unsqueeze(1))
            coefficients = within / precision.unsqueeze(1)
            _round_block(weight, target, coefficients, precision, grid, columns, codes, residual)
            left.update(columns)
            if columns.stop < span.stop:
                change, behind = torch.sub(now, before, out=before), slice(columns.stop, span.stop)
                gradients[:, :, rest].baddbmm_(change, hessian[:, columns, behind])


def output_error(residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(R H R^T) of each matrix of a stack: (E,) float64. On a GPU each product is right to 16 bits: rounding errors
    of millions of them average out, the largest by far is that of float32 sums along a row."""
    return product(residual, hessian).mul_(residual).sum(2).sum(1, dtype=torch.float64)


def row_errors(stack: torch.Tensor, factors: Factors) -> torch.Tensor:
    """r^T H r, H damped, for each row r of a stack (E, N, K): (E, N) float32, as the squared norm of D^1/2 U^T r. U is
    triangular, so that this is about half of the multiplications of `output_error`."""
    errors = torch.zeros(stack.shape[:2], device=stack.device)
    left = LeftSide(stack, SPAN)
    for span in _blocks(stack.shape[2], SPAN):
        through = left.times(factors.unit_upper[:, : span.stop, span])
        errors += through.square_().mul_(factors.diagonal[:, None, span]).sum(2)
    return errors


def sum_of_squares(stack: torch.Tensor) -> torch.Tensor:
    """(E,) float64 of (E, N, K): rows in the tensors' own type, and those in float64."""
    return torch.linalg.vector_norm(stack, dim=2).double().square().sum(1)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN or infinity, in one pass and without temporaries."""
    low, high = torch.aminmax(tensor)  # NaN where there is one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _blocks(columns: int, width: int) -> list[slice]:
    return [slice(first, min(first + width, columns)) for first in range(0, columns, width)]


def _spans(columns: int, block: int) -> list[slice]:
    """Columns in spans of whole blocks."""
    return _blocks(columns, max(1, SPAN // block) * block)


def _blocks_of(span: slice, block: int) -> Iterator[tuple[slice, slice, slice]]:
    """The blocks of a span: their columns; where these are within the span; and what of it lies behind them."""
    for inside in _blocks(span.stop - span.start, block):
        columns = slice(span.start + inside.start, span.start + inside.stop)
        yield columns, inside, slice(inside.stop, span.stop - span.start)


def _round_block(
    weight: torch.Tensor,
    target: torch.Tensor,
    coefficients: torch.Tensor,
    precision: torch.Tensor,
    grid: Grid,
    columns: slice,
    codes: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """The columns of one block, one after the other.

    Args:
        weight: (E, N, K). target: (E, N, B) float32, overwritten. coefficients: (E, B, B) float32, of which only what
            is above the diagonal is used. precision: (E, B) float32.
        codes, residual: (E, N, K), of which the block's columns are rewritten.
    """
    loops = inner_loops.of(weight)
    if loops is not None:
        loops.round_block(weight, target, coefficients, precision, grid, columns, codes, residual)
        return
    width = columns.stop - columns.start
    for j in range(width):
        k = columns.start + j
        code, value = grid.round(target[:, :, j], precision[:, j], k)
        new = weight[:, :, k] - value
        change = new - residual[:, :, k]
        codes[:, :, k] = code
        residual[:, :, k] = new
        if j + 1 < width:
            target[:, :, j + 1 :] += change.unsqueeze(2) * coefficients[:, j, j + 1 :].unsqueeze(1)
