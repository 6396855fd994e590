"""What a format will cost a stack of matrices, measured on a sample of their rows.

Rows of a matrix do not interact when it is rounded, but for a format's few shared numbers (the frequencies of ternary
codes). So the method itself on some rows of every matrix, with one factorization of the statistics for all formats that
are tried, tells errors and sizes of the whole at a fraction of its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..formats import IntFormat, IntMatrix, PackedTensor
from . import METHODS, quantize
from .base import Matrix, MethodSpec, StackStatistics, number_option
from .feedback import factorize
from .gptq import DAMPING, PRIOR, SWEEPS, grid_for, lean_on_pooled, rounded, ternary_matrices
from .grids import IntGrid, TernaryGrid
from .packing import pack

FEWER_STEPS = 12  # widths of a group's grid that are tried: fewer than "gptq" tries, and hardly worse


@dataclass(frozen=True)
class Estimate:
    """What a format would make of a stack.

    Attributes:
        nbytes: of the record of all rows; exact for int formats.
        errors: (E,) float64: squared error of the outputs per token, every output times its importance.
    """

    nbytes: int
    errors: torch.Tensor


class Estimator:
    """Estimates for one stack of float32 weights (E, N, K) with their statistics, all on one device."""

    def __init__(self, weights: torch.Tensor, statistics: StackStatistics, rows: int) -> None:
        """
        Args:
            statistics: with `row_importance`; their drift is not used.
            rows: how many rows of each matrix are tried.

        Raises:
            QmoeError: `E_VALUE` for statistics that are not finite.
        """
        assert statistics.row_importance is not None
        self.shape = (weights.shape[0], weights.shape[1], weights.shape[2])
        count = min(rows, self.shape[1])
        self.chosen = torch.arange(count, device=weights.device) * self.shape[1] // count
        self.scale = self.shape[1] / count
        self.whole, self.weights = weights, weights[:, self.chosen]
        self.importance = statistics.row_importance[:, self.chosen]
        self.statistics, _ = lean_on_pooled(replace(statistics, drift=None), PRIOR)
        self.factors = factorize(self.statistics.hessian, DAMPING)

    def of(self, spec: MethodSpec, *, tensor: str | None = None) -> Estimate:
        """The estimate for what `spec` says. Raises as `quantize`."""
        if METHODS[spec.method].needs_statistics:
            nbytes, residual = self._calibrated(spec)
        else:
            matrices = [quantize(weight.cpu(), spec, tensor=tensor)[0] for weight in self.weights]
            nbytes = self._bytes(spec, matrices)
            residual = self.weights - torch.from_numpy(np.stack([m.dequantize() for m in matrices])).to(self.weights)
        errors = (torch.bmm(residual, self.statistics.hessian) * residual).sum(2, dtype=torch.float64)
        return Estimate(nbytes, (errors * self.importance).sum(1) * self.scale)

    def _calibrated(self, spec: MethodSpec) -> tuple[int, torch.Tensor]:
        """(bytes, W - Q) of the sampled rows, as "gptq" makes them."""
        grid: IntGrid | TernaryGrid
        if isinstance(spec.format, IntFormat):
            options = {**spec.options, "steps": FEWER_STEPS}
            grid = grid_for(self.weights, self.statistics, self.factors, replace(spec, options=options))
        else:  # what a bit is worth in each row depends on the whole matrix
            grid = grid_for(self.whole, self.statistics, self.factors, spec)
            assert isinstance(grid, TernaryGrid)
            grid = TernaryGrid(spec.format, grid.price[:, self.chosen])
        sweeps = int(number_option(spec, "sweeps", SWEEPS, 0, 100))
        codes, residual = rounded(self.weights, self.factors, grid, sweeps)
        return self._bytes(spec, [] if isinstance(grid, IntGrid) else ternary_matrices(grid, codes)), residual

    def _bytes(self, spec: MethodSpec, matrices: Sequence[Matrix]) -> int:
        if isinstance(spec.format, IntFormat):
            return int_bytes(spec.format, self.shape)
        return int(pack(matrices).nbytes * self.scale)


def int_bytes(format: IntFormat, shape: Sequence[int]) -> int:
    """Bytes of the record of E matrices (N, K) in an int format."""
    experts, rows, columns = shape
    groups = -(-columns // format.group) if format.group else 1
    zeros = np.zeros((rows, groups), dtype=np.uint8) if format.zero_point else None
    matrix = IntMatrix(format, np.zeros((rows, columns), dtype=np.uint8), np.ones((rows, groups), np.float32), zeros)
    one, two = (PackedTensor.pack([matrix] * count).nbytes for count in (1, 2))
    return one + (experts - 1) * (two - one)
