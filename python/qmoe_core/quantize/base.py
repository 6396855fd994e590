"""What every quantization method gets and gives (methods know nothing of models).

data-free    quantize(weight, spec) -> (matrix, TensorReport)
calibrated   quantize_stack(weights, statistics, spec) -> [(matrix, TensorReport), ...]

weight       torch.float32 (N, K) = (out_features, in_features), finite; weights: (E, N, K)
statistics   `StackStatistics` of the inputs of these matrices
spec         `MethodSpec`: the format to produce and the method's own options
matrix       `IntMatrix` or `TernaryMatrix`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ..errors import QmoeError
from ..formats import IntFormat, IntMatrix, TernaryFormat, TernaryMatrix

Matrix = IntMatrix | TernaryMatrix
Format = IntFormat | TernaryFormat


@dataclass(frozen=True)
class StackStatistics:
    """Calibration statistics of the inputs of E matrices (N, K) of one layer, one expert each, all on one device.

    Attributes:
        tokens: (E,) int64: how many tokens each matrix saw.
        hessian: (E, K, K) float32: the sum of x x^T over those tokens, x as the compressed model sees it.
        pooled: (K, K) float32: the same sum over `pooled_tokens` tokens of the whole layer, what matrices that saw few
            or no tokens lean on; None where there is no such sum.
        drift: (E, K, K) float32: the sum of (x_original - x) x^T over the same tokens, or None.
        row_importance: (E, N) float32: what a squared error of 1 per token in each output is worth, for example as a
            share of the energy of the layer's output; None where all rows matter alike.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import StackStatistics
        >>> x = torch.eye(3)[:2]  # two tokens of one matrix
        >>> statistics = StackStatistics(torch.tensor([2]), (x.T @ x)[None])
        >>> statistics.hessian.shape
        torch.Size([1, 3, 3])
    """

    tokens: torch.Tensor
    hessian: torch.Tensor
    pooled: torch.Tensor | None = None
    pooled_tokens: int = 0
    drift: torch.Tensor | None = None
    row_importance: torch.Tensor | None = None

    def select(self, experts: slice) -> StackStatistics:
        """The statistics of some of the matrices; views, no copies."""
        drift = None if self.drift is None else self.drift[experts]
        importance = None if self.row_importance is None else self.row_importance[experts]
        return StackStatistics(
            self.tokens[experts], self.hessian[experts], self.pooled, self.pooled_tokens, drift, importance
        )


@dataclass(frozen=True)
class MethodSpec:
    """Which method makes which format, with which options (only the keys that the method's `OPTIONS` name)."""

    method: str
    format: Format
    options: Mapping[str, float | int | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorReport:
    """How far one quantized matrix is from its original. Sums, so that the reports of a stack's experts add up."""

    weights: int
    error_sum: float  # sum of (W - Q)^2
    weight_sum: float  # sum of W^2
    zeros: int  # quantized weights that are exactly zero
    formats: Mapping[str, int] = field(default_factory=dict)  # format name -> number of matrices
    output_error: float = 0.0  # tr((W - Q) H (W - Q)^T) per token, where statistics were given
    output_energy: float = 0.0  # tr(W H W^T) per token; of large matrices both may be estimated from some of their rows
    notes: Mapping[str, int] = field(default_factory=dict)  # what was done about missing statistics -> matrices

    @property
    def relative_output_error(self) -> float | None:
        """sqrt of output error over output energy; None without statistics."""
        return float(np.sqrt(self.output_error / self.output_energy)) if self.output_energy > 0 else None

    @property
    def relative_error(self) -> float:
        """||W - Q|| / ||W|| (Frobenius); 0 for an all-zero W reproduced exactly."""
        if self.weight_sum == 0.0:
            return 0.0 if self.error_sum == 0.0 else float("inf")
        return float(np.sqrt(self.error_sum / self.weight_sum))

    def __add__(self, other: TensorReport) -> TensorReport:
        formats, notes = Counter(self.formats), Counter(self.notes)
        formats.update(other.formats)
        notes.update(other.notes)
        return TensorReport(
            self.weights + other.weights,
            self.error_sum + other.error_sum,
            self.weight_sum + other.weight_sum,
            self.zeros + other.zeros,
            dict(formats),
            self.output_error + other.output_error,
            self.output_energy + other.output_energy,
            dict(notes),
        )


class Method(Protocol):
    """The signature of a data-free method."""

    def __call__(self, weight: torch.Tensor, spec: MethodSpec) -> tuple[Matrix, TensorReport]: ...


class StackMethod(Protocol):
    """The signature of a calibrated method."""

    def __call__(
        self, weight: torch.Tensor, statistics: StackStatistics, spec: MethodSpec
    ) -> list[tuple[Matrix, TensorReport]]: ...


def check_weight(weight: torch.Tensor) -> np.ndarray:
    """The weight as a contiguous float32 (N, K) array. Raises `E_DTYPE`, `E_SHAPE`, or `E_VALUE` for NaN and
    infinity."""
    if weight.dtype != torch.float32:
        raise QmoeError("E_DTYPE", "quantizers take float32 weights", expected="float32", actual=str(weight.dtype))
    if weight.ndim != 2 or 0 in weight.shape:
        raise QmoeError("E_SHAPE", "a weight is a matrix of at least 1 x 1", actual=tuple(weight.shape))
    array = np.ascontiguousarray(weight.detach().cpu().numpy())
    finite = np.isfinite(array)
    if not finite.all():
        at = int(np.argmin(finite))
        raise QmoeError(
            "E_VALUE",
            f"the weight has {array.size - int(finite.sum())} NaN or infinite values, the first in row "
            f"{at // array.shape[1]}, column {at % array.shape[1]}",
            actual=float(array.flat[at]),
        )
    return array


def row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """Rows in blocks of about a million weights: work that needs several temporaries per weight goes block by block, so
    that a matrix of 100 M weights (one Mixtral expert) does not cost gigabytes of them, and stays in the caches."""
    rows, cols = shape
    step = max(1, (1 << 20) // cols)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _rows(matrix: Matrix, rows: slice) -> Matrix:
    if isinstance(matrix, IntMatrix):
        zeros = None if matrix.zeros is None else matrix.zeros[rows]
        return IntMatrix(matrix.format, matrix.codes[rows], matrix.scales[rows], zeros)
    return TernaryMatrix(matrix.format, matrix.trits[rows], matrix.levels[rows])


def measure(weight: np.ndarray, matrix: Matrix) -> TensorReport:
    """Compares a float32 (N, K) weight with its quantized matrix. Sums are taken by numpy in float64, block by block:
    their order, and so their last bit, does not depend on the number of threads."""
    error_sum = weight_sum = 0.0
    nonzero = 0
    for rows in row_blocks(weight.shape):
        original, quantized = weight[rows].ravel(), _rows(matrix, rows).dequantize().ravel()
        nonzero += int(np.count_nonzero(quantized))
        np.subtract(original, quantized, out=quantized)
        error_sum += float(np.add.reduce(np.square(quantized, dtype=np.float64)))
        weight_sum += float(np.add.reduce(np.square(original, dtype=np.float64)))
    return TensorReport(weight.size, error_sum, weight_sum, weight.size - nonzero, {matrix.format.name: 1})


def dequantized(matrix: Matrix, device: torch.device | str) -> torch.Tensor:
    """`matrix.dequantize()`, the same bits, computed on a device: (N, K) float32. Codes and scales travel there."""
    out = torch.empty(1, *matrix.shape, device=device)
    _values([matrix], [array[None] if array is not None else None for array in _arrays(matrix)], out)
    return out[0]


def dequantize(matrices: Sequence[Matrix], into: torch.Tensor) -> None:
    """Fills `into` (E, N, K) float32, contiguous and on any device, with the values of its matrices: `dequantized` of
    each, but all at once where they are alike and their arrays are the entries of stacks."""
    arrays = list(zip(*map(_arrays, matrices), strict=True)) if len({m.format for m in matrices}) == 1 else []
    stacks = [_stack(entries) for entries in arrays]
    if stacks and all(stack is not None or of[0] is None for stack, of in zip(stacks, arrays, strict=True)):
        _values(matrices, stacks, into)
        return
    for place, matrix in zip(into, matrices, strict=True):
        place.copy_(dequantized(matrix, into.device))


def _arrays(matrix: Matrix) -> tuple[np.ndarray | None, ...]:
    if isinstance(matrix, TernaryMatrix):
        return matrix.trits, matrix.levels
    return matrix.codes, matrix.scales, matrix.zeros


def _stack(entries: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The array that these are the entries of, all and in order, or None."""
    first = entries[0]
    whole = None if first is None else first.base
    if first is None or not isinstance(whole, np.ndarray) or whole.dtype != first.dtype:
        return None
    if whole.shape != (len(entries), *first.shape) or not whole.flags.c_contiguous:
        return None
    step = whole.strides[0]
    for place, entry in enumerate(entries):
        if entry is None or entry.base is not whole or entry.ctypes.data != whole.ctypes.data + place * step:
            return None
    return whole


def _values(matrices: Sequence[Matrix], stacks: Sequence[np.ndarray | None], out: torch.Tensor) -> None:
    """Values of matrices of one format, whose arrays (`_arrays`) are those stacks, into (E, N, K)."""

    def there(array: np.ndarray | None) -> torch.Tensor:
        assert array is not None
        return torch.from_numpy(array).to(out.device)

    format = matrices[0].format
    if isinstance(format, TernaryFormat):
        signs, levels = there(stacks[0]), there(stacks[1])
        high = levels[..., -1:]
        low = -high if levels.shape[2] == 1 else levels[..., :1]
        torch.where(signs > 0, high, torch.where(signs < 0, low, torch.zeros_like(high)), out=out)
        return
    columns = out.shape[2]
    codes, scales = there(stacks[0]), there(stacks[1])
    stored = there(stacks[2]).float() if format.zero_point else torch.full_like(scales, 2.0 ** (format.bits - 1))
    zero = stored + format.zero_offset
    width = min(format.group or columns, columns)
    if columns % width == 0:
        grouped = out.view(*out.shape[:2], -1, width)
        torch.sub(codes.view_as(grouped), zero.unsqueeze(3), out=grouped).mul_(scales.unsqueeze(3))
        return
    scale, zero = (of.repeat_interleave(width, dim=2)[..., :columns] for of in (scales, zero))
    torch.sub(codes, zero, out=out).mul_(scale)


def need_int(spec: MethodSpec) -> IntFormat:
    """The spec's format as an IntFormat, or `E_VALUE`."""
    if not isinstance(spec.format, IntFormat):
        raise QmoeError("E_VALUE", f"method '{spec.method}' makes int formats", expected="int", actual=spec.format.name)
    return spec.format


def need_ternary(spec: MethodSpec) -> TernaryFormat:
    """The spec's format as a TernaryFormat, or `E_VALUE`."""
    if not isinstance(spec.format, TernaryFormat):
        raise QmoeError(
            "E_VALUE", f"method '{spec.method}' makes ternary formats", expected="ternary", actual=spec.format.name
        )
    return spec.format


def number_option(spec: MethodSpec, name: str, default: float, low: float, high: float) -> float:
    """A numeric option within [low, high], or `E_VALUE` naming it."""
    value = spec.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise QmoeError(
            "E_VALUE",
            f"option '{name}' of method '{spec.method}' is out of range",
            expected=f"{low} to {high}",
            actual=value,
        )
    return float(value)
