"""Which weights of a matrix may be zero together, and how the best are kept.

A pattern turns scores (what each weight is worth) into a mask (True: kept). It takes a matrix (N, K) =
(out_features, in_features) or a stack of them (E, N, K), each matrix on its own. Among equal scores the one with the
lower index in its matrix, row by row, is kept: the same scores give the same mask on every device.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import torch

from ..errors import QmoeError

# The share of weights that become zero: one number, or one for each matrix of a stack.
Sparsity = float | Sequence[float]

_AT_ONCE = 1 << 24  # scores that are ranked together, of several matrices: memory is a few times theirs
_SMALL_GROUP = 8  # up to here comparing all pairs of a group is faster than sorting it (3 times at 4)


def check_sparsity(sparsity: float) -> float:
    """A share within [0, 1] as float, or `E_VALUE`."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity <= 1.0:
        raise QmoeError("E_VALUE", "a sparsity is a share of the weights", expected="0 to 1", actual=sparsity)
    return float(sparsity)


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` weights are kept: size * (1 - sparsity), rounded half to even, and at least 1 unless the
    sparsity is 1."""
    return max(round(size * (1.0 - sparsity)), int(sparsity < 1.0))


def as_stack(tensor: torch.Tensor) -> torch.Tensor:
    """(N, K) or (E, N, K) as (E, N, K), a view. Raises `E_SHAPE`."""
    if tensor.ndim not in (2, 3) or 0 in tensor.shape:
        raise QmoeError(
            "E_SHAPE",
            "patterns take matrices and stacks of them",
            expected="(N, K), (E, N, K)",
            actual=tuple(tensor.shape),
        )
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Marks the `keep` largest numbers of every row, equal ones by lower index: (R, L) -> (R, L) bool."""
    length = scores.shape[1]
    if not 0 < keep < length:
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    threshold = scores.kthvalue(length - keep + 1, dim=1, keepdim=True).values
    mask, level = scores > threshold, scores == threshold
    room = keep - mask.sum(1, keepdim=True)
    if bool((level.sum(1, keepdim=True) > room).any()):
        level &= level.cumsum(1) <= room
    return mask.logical_or_(level)


@dataclass(frozen=True)
class Pattern(ABC):
    """A rule which weights are zero together. Make one with `Pattern.parse`; `str` gives the text back.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Pattern
        >>> Pattern.parse("2:4").select(torch.tensor([[3.0, 1.0, 2.0, 2.0]]))
        tensor([[ True, False,  True, False]])
    """

    @staticmethod
    def parse(text: str) -> Pattern:
        """Reads a pattern.

            2:4, 4:8, 16:32   `NM`: of every 4 (8, 32) neighbours along K, 2 (4, 16) are kept
            block:4x4         `Block`: blocks of 4 rows and 4 columns, by the mean of their scores (block:4x4:max)
            channel:0         `Channel`: whole rows (0) or columns (1), by the mean of their scores
            unstructured      `Unstructured`: any weights; unstructured:row: equally many in every row

        Raises:
            QmoeError: `E_VALUE`.
        """
        if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"block:(\d{1,4})x(\d{1,4})(:max|:mean)?", text):
            return Block(int(match[1]), int(match[2]), (match[3] or ":mean")[1:])
        if match := re.fullmatch(r"channel:([01])", text):
            return Channel(int(match[1]))
        if text in ("unstructured", "unstructured:row"):
            return Unstructured("row" if text.endswith("row") else "matrix")
        known = "2:4, 4:8, 16:32, block:4x4, channel:0, unstructured"
        raise QmoeError("E_VALUE", "unknown sparsity pattern", expected=f"like {known}", actual=text)

    @property
    def sparsity(self) -> float | None:
        """The share of zeros, where the pattern fixes it."""
        return None

    def select(self, scores: torch.Tensor, sparsity: Sparsity | None = None) -> torch.Tensor:
        """The mask that keeps the highest scores.

        Args:
            scores: (N, K) or (E, N, K), any float type; infinities are allowed.
            sparsity: share of the weights that are not kept, in [0, 1], for all matrices or for each of them; as near
                as the units of the pattern allow (`kept_count`). May be left out where the pattern fixes it.

        Returns:
            A bool tensor like `scores`, on the same device; True: kept.

        Raises:
            QmoeError: `E_SHAPE` (no matrices, or not divisible into groups or blocks), `E_DTYPE` (no floats), `E_VALUE`
                (NaN scores, no or an impossible sparsity).
        """
        if not scores.dtype.is_floating_point:
            raise QmoeError("E_DTYPE", "scores are floating-point numbers", actual=str(scores.dtype))
        stack = as_stack(scores.detach())
        self.check_shape(scores.shape)
        bad = stack.isnan()
        if bool(bad.any()):
            first = tuple(bad.nonzero()[0].tolist())[-scores.ndim :]
            raise QmoeError("E_VALUE", f"{int(bad.sum())} scores are NaN, the first at {first}")
        if stack.dtype not in (torch.float32, torch.float64):
            stack = stack.float()
        return self._select(stack, self._sparsities(sparsity, len(stack))).view(scores.shape)

    def _sparsities(self, sparsity: Sparsity | None, matrices: int) -> list[float]:
        fixed = self.sparsity
        if sparsity is None:
            if fixed is None:
                raise QmoeError("E_VALUE", f"pattern '{self}' needs a sparsity")
            sparsity = fixed
        values = [sparsity] * matrices if isinstance(sparsity, (int, float)) else list(sparsity)
        if len(values) != matrices:
            raise QmoeError("E_SHAPE", "one sparsity for each matrix", expected=matrices, actual=len(values))
        values = [check_sparsity(value) for value in values]
        if fixed is not None and any(abs(value - fixed) > 1e-6 for value in values):
            raise QmoeError("E_VALUE", f"pattern '{self}' has its own sparsity", expected=fixed, actual=sparsity)
        return values

    @abstractmethod
    def _select(self, scores: torch.Tensor, sparsities: list[float]) -> torch.Tensor:
        """`select` of a sound stack (E, N, K), float32 or float64, with one sparsity per matrix."""

    def check_shape(self, shape: Sequence[int]) -> None:  # noqa: B027  # most patterns take any shape
        """Raises `E_SHAPE` unless matrices of this shape (..., N, K) divide into the pattern's units."""

    def fits(self, mask: torch.Tensor) -> bool:
        """Whether a mask (N, K) or (E, N, K) consists of whole units of this pattern."""
        return True


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weights of a matrix. `per` = "row": equally many in every row, what Wanda compares within.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Unstructured
        >>> Unstructured().select(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 0.5)
        tensor([[False,  True],
                [ True, False]])
    """

    per: str = "matrix"

    def __str__(self) -> str:
        return "unstructured" if self.per == "matrix" else "unstructured:row"

    def _select(self, scores: torch.Tensor, sparsities: list[float]) -> torch.Tensor:
        masks, first = torch.empty_like(scores, dtype=torch.bool), 0
        most = max(1, _AT_ONCE // max(1, scores[0].numel())) if len(scores) else 1
        for sparsity, group in groupby(sparsities):
            last = first + len(list(group))
            for begin in range(first, last, most):  # on a GPU one matrix alone would leave most of it idle
                part = scores[begin : min(begin + most, last)]
                rows = part.flatten(0, 1) if self.per == "row" else part.flatten(1)
                masks[begin : begin + len(part)] = largest(rows, kept_count(rows.shape[1], sparsity)).view(part.shape)
            first = last
        return masks


@dataclass(frozen=True)
class NM(Pattern):
    """n of every m neighbours along K are kept, written n:m. 2:4 is what NVIDIA's sparse tensor cores multiply.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import NM
        >>> NM(1, 2).select(torch.tensor([[1.0, 4.0, 3.0, 3.0]])), NM(2, 4).sparsity
        (tensor([[False,  True,  True, False]]), 0.5)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if not 0 < self.n < self.m <= 1024:
            raise QmoeError("E_VALUE", "n:m keeps n of m, 0 < n < m <= 1024", actual=f"{self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def candidates(self) -> torch.Tensor:
        """All masks of one group, (C(m, n), m) bool, in the order of MaskLLM (arXiv 2409.17481): for 2:4 these are
        1100 1010 1001 0110 0101 0011. Raises `E_LIMIT` where there are more than 65536."""
        sets = []
        for places in combinations(range(self.m), self.n):
            sets.append(places)
            if len(sets) > 1 << 16:
                raise QmoeError("E_LIMIT", f"pattern '{self}' has too many masks per group to list", expected=1 << 16)
        return torch.zeros(len(sets), self.m, dtype=torch.bool).scatter_(1, torch.tensor(sets), True)

    def check_shape(self, shape: Sequence[int]) -> None:
        if shape[-1] % self.m:
            raise QmoeError(
                "E_SHAPE", f"pattern '{self}' needs in_features divisible by {self.m}", actual=tuple(shape)
            )  # fmt: skip

    def _select(self, scores: torch.Tensor, sparsities: list[float]) -> torch.Tensor:
        return self.best(scores)

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        """`select` without its checks, for inner loops: (..., K) without NaN, K divisible by m."""
        groups = scores.unflatten(-1, (-1, self.m))
        if self.m > _SMALL_GROUP:
            order = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        else:
            before = torch.zeros_like(groups, dtype=torch.int8)  # how many of its group come before each
            for i in range(self.m):
                for j in range(i):
                    wins = groups[..., j] >= groups[..., i]
                    before[..., i] += wins
                    before[..., j] += ~wins
            mask = before < self.n
        return mask.flatten(-2)

    def fits(self, mask: torch.Tensor) -> bool:
        if mask.shape[-1] % self.m:
            return False
        return bool((mask.unflatten(-1, (-1, self.m)).sum(-1) == self.n).all())


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` x `columns` weights are kept or not as a whole, by the mean or maximum (`pool`) of their scores.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Block
        >>> Block(1, 2).select(torch.tensor([[1.0, 4.0, 3.0, 3.0]]), 0.5)
        tensor([[False, False,  True,  True]])
    """

    rows: int
    columns: int
    pool: str = "mean"

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if self.rows < 1 or self.columns < 1 or self.pool not in ("mean", "max"):
            raise QmoeError("E_VALUE", "blocks are at least 1 x 1, pooled by mean or max", actual=str(self))

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}" + (":max" if self.pool == "max" else "")

    def check_shape(self, shape: Sequence[int]) -> None:
        if shape[-2] % self.rows or shape[-1] % self.columns:
            raise QmoeError(
                "E_SHAPE",
                f"pattern '{self}' needs out_features divisible by {self.rows}, in_features by {self.columns}",
                actual=tuple(shape),
            )

    def _blocks(self, stack: torch.Tensor) -> torch.Tensor:
        """(E, N, K) as (E, blocks down, blocks across, weights of a block)."""
        tiles = stack.unflatten(2, (-1, self.columns)).unflatten(1, (-1, self.rows))
        return tiles.transpose(2, 3).flatten(3)

    def _select(self, scores: torch.Tensor, sparsities: list[float]) -> torch.Tensor:
        blocks = self._blocks(scores)
        pooled = blocks.mean(3) if self.pool == "mean" else blocks.amax(3)
        mask = Unstructured()._select(pooled, sparsities)
        return mask.repeat_interleave(self.rows, 1).repeat_interleave(self.columns, 2)

    def fits(self, mask: torch.Tensor) -> bool:
        if mask.shape[-2] % self.rows or mask.shape[-1] % self.columns:
            return False
        blocks = self._blocks(as_stack(mask))
        return bool((blocks == blocks[..., :1]).all())


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole rows (`axis` 0, outputs) or columns (1, inputs), by the mean of their scores.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Channel
        >>> Channel(1).select(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 0.5)
        tensor([[False,  True],
                [False,  True]])
    """

    axis: int

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if self.axis not in (0, 1):
            raise QmoeError("E_VALUE", "channels are rows or columns", expected="0 or 1", actual=self.axis)

    def __str__(self) -> str:
        return f"channel:{self.axis}"

    def _select(self, scores: torch.Tensor, sparsities: list[float]) -> torch.Tensor:
        across = 2 - self.axis
        mask = Unstructured()._select(scores.mean(across, keepdim=True), sparsities)
        return mask.expand(scores.shape).contiguous()

    def fits(self, mask: torch.Tensor) -> bool:
        stack = as_stack(mask)
        return bool((stack == stack.narrow(2 - self.axis, 0, 1)).all())
