"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune column by column, later columns make up for earlier ones.

With second moments H = U D U^T of the inputs (U unit upper triangular, `quantize.feedback`), setting weight w_j of a
row to zero costs d_j w_j^2 as long as all columns behind it may still move, and they do best to move by -w_j V_jk,
where V = U^-1. (d_j is 1 / [H_j^-1]_jj and V_jk is [H_j^-1]_jk / [H_j^-1]_jj, H_j being what is left of H at column j:
one factorization and one triangular inverse instead of the inverses.) Which weights go is decided from what feedback
has made of them: for every group of an n:m pattern when its first column comes; else for 128 columns at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..quantize.base import StackStatistics
from ..quantize.feedback import SPAN, factorize
from ..quantize.products import LeftSide
from .patterns import NM, Unstructured
from .spec import Pruned, PruneSpec, moments, number

OPTIONS = frozenset({"damping", "prior"})
DAMPING = 0.01
BLOCK = 128  # columns whose weights compete where there are no groups
STEP = 16  # columns within which feedback goes one by one; further on it is one product

# Scores (E, N, B) of some columns, and which these are -> bool (E, N, B): which of them are kept.
Choice = Callable[[torch.Tensor, slice], torch.Tensor]


def prune(weight: torch.Tensor, statistics: StackStatistics | None, spec: PruneSpec, tensor: str) -> Pruned:
    """Prunes float32 weights (E, N, K) and updates those that are kept.

    Blocks and channels, which may be wider than what competes at once, are chosen from the original weights; feedback
    is the same.

    Options:
        damping (0.01): added to the diagonal of H, in units of its mean; more where H is singular.
        prior (0.25): how much the layer's pooled statistics weigh, in tokens per column.
    """
    assert statistics is not None
    hessian, notes = moments(statistics, spec)
    inverse, precision = inverse_factor(hessian, number(spec, "damping", DAMPING, 0.0, 1.0))
    del hessian
    pattern, whole = spec.pattern, None
    if not isinstance(pattern, (NM, Unstructured)):
        whole = pattern.select(weight.square() * precision.unsqueeze(1), spec.sparsity)

    def choose(scores: torch.Tensor, columns: slice) -> torch.Tensor:
        if whole is not None:
            return whole[:, :, columns]
        return pattern.best(scores) if isinstance(pattern, NM) else pattern.select(scores, spec.sparsity)

    group = pattern.m if isinstance(pattern, NM) else BLOCK
    mask, updated = prune_with_feedback(weight, inverse, precision, choose, group)
    return Pruned(updated, mask, notes)


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """V (E, K, K) unit upper triangular and d (E, K) of second moments (E, K, K), as above. Raises `E_VALUE`."""
    factors = factorize(hessian, damping)
    upper, diagonal = factors.unit_upper, factors.diagonal
    del factors  # and with it the damped matrix
    one = torch.eye(upper.shape[1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one.expand_as(upper), upper=True, unitriangular=True), diagonal


def prune_with_feedback(
    weight: torch.Tensor, inverse: torch.Tensor, precision: torch.Tensor, choose: Choice, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep over the columns.

    Args:
        weight: (E, N, K). inverse, precision: V (E, K, K) and d (E, K) of the same type.
        choose: gets scores d_j w_j^2 of `group` columns (of a last group perhaps fewer).

    Returns:
        The mask (E, N, K) bool and the updated weights (E, N, K), zero where not kept.
    """
    columns = weight.shape[2]
    block = max(BLOCK // group, 1) * group
    span = max(SPAN // block, 1) * block
    updated = weight.clone()
    lost = torch.zeros_like(weight)  # what each weight was when it was set to zero
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    left = LeftSide(lost, block, zero=True)
    for start in range(0, columns, span):
        stop = min(start + span, columns)
        if start:
            updated[:, :, start:stop] -= left.times(inverse[:, :start, start:stop])
        for first in range(start, stop, block):
            here = slice(first, min(first + block, stop))
            _block(updated, lost, mask, inverse[:, here, here], precision[:, here], choose, group, here)
            left.update(here)
            if here.stop < stop:
                behind = slice(here.stop, stop)
                updated[:, :, behind].baddbmm_(lost[:, :, here], inverse[:, here, behind], alpha=-1)
    return mask, updated


def _block(
    updated: torch.Tensor,
    lost: torch.Tensor,
    mask: torch.Tensor,
    inverse: torch.Tensor,
    precision: torch.Tensor,
    choose: Choice,
    group: int,
    here: slice,
) -> None:
    """The columns `here` of `updated`, `lost` and `mask` (E, N, K), in memory one after the other: a column of all rows
    is one piece then. inverse (E, B, B), precision (E, B): of these columns."""
    width = here.stop - here.start
    now = updated[:, :, here].transpose(1, 2).contiguous()  # (E, B, N)
    gone, pruned = torch.empty_like(now), torch.empty_like(now, dtype=torch.bool)
    step = group if group < BLOCK else STEP
    for begin in range(0, width, step):
        end = min(begin + step, width)
        if begin % group == 0:
            ahead = slice(begin, min(begin + group, width))
            scores = (now[:, ahead].square() * precision[:, ahead].unsqueeze(2)).transpose(1, 2)
            kept = choose(scores, slice(here.start + ahead.start, here.start + ahead.stop))
            torch.logical_not(kept.transpose(1, 2), out=pruned[:, ahead])
        for j in range(begin, end):
            torch.mul(now[:, j], pruned[:, j], out=gone[:, j])
            now[:, j:end].addcmul_(gone[:, j : j + 1], inverse[:, j, j:end].unsqueeze(2), value=-1)
        if end < width:
            now[:, end:].baddbmm_(inverse[:, begin:end, end:].transpose(1, 2), gone[:, begin:end], alpha=-1)
    updated[:, :, here] = now.transpose(1, 2)
    lost[:, :, here] = gone.transpose(1, 2)
    torch.logical_not(pruned.transpose(1, 2), out=mask[:, :, here])
