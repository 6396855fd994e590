"""ALPS (Meng et al., arXiv 2406.07831): the support by ADMM on the whole matrix, then the best weights on it.

With second moments H of the inputs, scaled to a unit diagonal, and the weights W with them,

    minimize  tr((B - W) H (B - W)^T)  over B with at most so many nonzeros (n of every m, ...)

B and its sparse copy D are held together by a penalty rho, which grows as long as the support of D still changes; once
it does not, a few steps of conjugate gradients, every row for itself, move the kept weights to their optimum.
"""

from __future__ import annotations

import torch

from ..quantize.base import StackStatistics
from .patterns import Pattern, Sparsity
from .spec import Pruned, PruneSpec, moments, number

OPTIONS = frozenset({"damping", "prior", "rho", "iterations", "refine"})
DAMPING, RHO, ITERATIONS, REFINE = 0.01, 0.1, 300, 10  # the paper's
EVERY = 3  # iterations between changes of rho
# Share of the kept weights by which the support has changed -> growth of rho.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SETTLED, SETTLED_AFTER = 3e-4, 30  # a change so small is none, after that many iterations
MAX_RHO = 1e6
TOLERANCE = 1e-4  # of the conjugate gradients, relative


def prune(weight: torch.Tensor, statistics: StackStatistics | None, spec: PruneSpec, tensor: str) -> Pruned:
    """Prunes float32 weights (E, N, K), one matrix after the other, and updates those that are kept.

    Options:
        damping (0.01): added to the diagonal of H, in units of its mean. prior (0.25): see `sparsegpt.prune`.
        rho (0.1), iterations (300): of ADMM. refine (10): steps of conjugate gradients.
    """
    assert statistics is not None
    hessian, notes = moments(statistics, spec)
    damping = number(spec, "damping", DAMPING, 1e-6, 1.0)
    rho = number(spec, "rho", RHO, 1e-6, MAX_RHO)
    iterations = int(number(spec, "iterations", ITERATIONS, 1, 10_000))
    steps = int(number(spec, "refine", REFINE, 0, 10_000))
    pruned, masks = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    for expert in range(len(weight)):
        sparsity = spec.sparsity if not isinstance(spec.sparsity, (list, tuple)) else spec.sparsity[expert]
        pruned[expert], masks[expert] = prune_matrix(
            weight[expert], hessian[expert], spec.pattern, sparsity, damping, rho, iterations, steps
        )
    return Pruned(pruned, masks, notes)


def prune_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: Sparsity | None,
    damping: float,
    rho: float,
    iterations: int,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix (N, K) with its second moments (K, K), both of one type: the pruned weights and the mask."""
    diagonal = hessian.diagonal() + damping * hessian.diagonal().mean()
    scale = diagonal.sqrt()
    scaled = (hessian + torch.diag(diagonal - hessian.diagonal())) / scale / scale.unsqueeze(1)
    dense = weight * scale
    mask = support(dense, scaled, pattern, sparsity, rho, iterations)
    return refine(dense, scaled, mask, steps) / scale, mask


def support(
    dense: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, sparsity: Sparsity | None, rho: float, iterations: int
) -> torch.Tensor:
    """The mask (N, K) that ADMM finds for weights (N, K) and second moments (K, K) with a unit diagonal."""
    if not bool((hessian - torch.diag(hessian.diagonal())).any()):
        return pattern.select(dense.square(), sparsity)  # without correlations there is nothing better
    values, vectors = torch.linalg.eigh(hessian.double())
    pull = dense @ hessian

    def solver(rho: float) -> torch.Tensor:
        return ((vectors / (values + rho)) @ vectors.T).to(dense.dtype)

    mask = first = pattern.select(dense.square(), sparsity)
    sparse, multiplier, inverse = dense * mask, torch.zeros_like(dense), solver(rho)
    solution, grown, kept = dense, False, max(int(mask.sum()), 1)
    for iteration in range(1, iterations + 1):
        solution = (pull - multiplier + rho * sparse) @ inverse
        free = solution + multiplier / rho
        now = pattern.select(free.square(), sparsity)
        sparse = free * now
        multiplier += rho * (solution - sparse)
        if iteration % EVERY:
            continue
        changed = int((now ^ mask).sum())
        mask = now
        if changed == 0 and grown:
            break
        if changed / kept > GROWTH[1][0]:
            grown = True
        if grown:
            growth = next(growth for share, growth in GROWTH if changed / kept > share)
            rho = min(rho * growth, MAX_RHO)
        else:  # rho is so large that hardly anything moves: again with less of it, from the beginning
            rho /= 5
            mask, sparse = first, dense * first
            multiplier.zero_()
        inverse = solver(rho)
        if iteration >= SETTLED_AFTER and changed / kept < SETTLED:
            break
    return pattern.select(solution.square(), sparsity)


def refine(dense: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """The weights (N, K) on the mask that come closest to `dense` under H: conjugate gradients, from the dense weights
    masked, each row with steps of its own."""
    solution = dense * mask
    residual = ((dense - solution) @ hessian) * mask
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    goal = TOLERANCE**2 * energy
    for _ in range(steps):
        through = (direction @ hessian) * mask
        curvature = (direction * through).sum(1, keepdim=True)
        size = torch.where(energy > goal, energy / curvature.clamp(min=1e-30), torch.zeros_like(energy))
        solution += size * direction
        residual -= size * through
        before, energy = energy, residual.square().sum(1, keepdim=True)
        direction = residual + energy / before.clamp(min=1e-30) * direction
        if bool((energy <= goal).all()):
            break
    return solution
