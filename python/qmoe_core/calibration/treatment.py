"""What the pipeline does to a weight. It knows no more of it than this: rounding (`Rounding`) is one such treatment,
pruning (`sparsify/treatment.py`) another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from .. import quantize as methods
from ..families import Target
from ..formats import IntMatrix, RecordPart, RecordPieces, TernaryMatrix
from ..quantize import Matrix, MethodSpec, StackStatistics, TensorReport
from ..quantize.base import dequantize
from ..quantize.packing import pack
from ..source import CheckedReader

KEPT_THERE = 1 / 32  # of a GPU's memory, that the trits of a stack may take

Made = list[tuple[Any, TensorReport]]  # by matrix: what a treatment has made of it, which can be pickled, and a report


@dataclass
class StackResult(ABC):
    """What has become of one stack, growing chunk by chunk; reports and what `add` is given only on the process that
    leads.

    Attributes:
        reader: of what this process reads of the stack's source. tokens: by matrix, where there are statistics.
    """

    target: Target
    treatment: Treatment
    reader: CheckedReader
    reports: list[TensorReport] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def part(self, made: Made, threads: int) -> Any:
        """What this process sends of the matrices that it has made, in the form that `take` takes: it is made behind
        the computation, by as many threads."""
        return made

    def take(self, parts: list[Any] | None) -> None:
        """Adds matrices, by the process that made them; None on those that do not lead."""
        for made, report in chain.from_iterable(parts or []):
            self.add(made)
            self.reports.append(report)

    @abstractmethod
    def add(self, made: Any) -> None:
        """Adds the next matrix."""


class Treatment(Protocol):
    """What is done to a weight: see `Rounding`."""

    @property
    def needs_statistics(self) -> bool:
        """Whether `of_stack` is to be called, else `of_matrix`."""

    @property
    def weighs_rows(self) -> bool:
        """Whether `StackStatistics.row_importance` counts."""

    def of_matrix(self, weight: torch.Tensor, tensor: str) -> tuple[Any, TensorReport]:
        """Treats one float32 (N, K) matrix on the host. `tensor`: its name, for errors."""

    def of_stack(self, weights: torch.Tensor, statistics: StackStatistics, tensor: str) -> Made:
        """Treats float32 weights (E, N, K) on the device of the statistics."""

    def restore(self, made: Made, into: torch.Tensor) -> None:
        """The matrices to go on with, into (E, N, K) float32."""

    def locked_bytes(self, target: Target) -> int:
        """Of page-locked host memory that `of_stack` takes on a GPU, for each matrix of the target, about."""

    def result(self, target: Target, reader: CheckedReader) -> StackResult:
        """An empty result for a stack."""


Packed = tuple[list[RecordPart], list[TensorReport]]  # of some matrices, and a report for each


@dataclass
class PackedStack(StackResult):
    """Quantized matrices of a stack.

    Matrices in `int` are packed by the process that made them, chunk by chunk, which leaves half of the bytes to send
    or to keep, and joined in the end. A ternary record has one code for all of its matrices, which must be there first;
    trits that this process made on a GPU also stay there to be encoded, if those of the whole stack take no more than
    `KEPT_THERE` of its memory.
    """

    matrices: list[TernaryMatrix] = field(default_factory=list)
    parts: list[RecordPart] = field(default_factory=list)

    # Of all matrices: one allocation, where many would leave memory full of holes; and the same on a GPU.
    _trits: np.ndarray | None = None
    _there: torch.Tensor | None = None

    def part(self, made: Made, threads: int) -> Made | Packed:
        if not all(isinstance(matrix, IntMatrix) for matrix, _ in made):
            return made
        packed = [RecordPart.pack([matrix for matrix, _ in made], threads)] if made else []
        return packed, [report for _, report in made]

    def take(self, parts: list[Made | Packed] | None) -> None:
        for part in parts or []:
            if isinstance(part, tuple):
                self.parts += part[0]
                self.reports += part[1]
            else:
                super().take([part])

    def add(self, made: TernaryMatrix) -> None:
        if self.target.kind == "experts":
            if self._trits is None:
                self._trits = np.empty(self.target.shape, dtype=np.int8)
            mine = self._trits[len(self.matrices)]
            mine[:] = made.trits
            made.trits = mine
            made.there = self._keep_there(made.there)
        self.matrices.append(made)

    def _keep_there(self, trits: torch.Tensor | None) -> torch.Tensor | None:
        """The next matrix's trits in the stack's memory on their GPU; None where they, or others, are not kept."""
        at = len(self.matrices)
        if trits is None or (at > 0 and self._there is None):
            self._there = None
            return None
        if self._there is None:
            memory = torch.cuda.get_device_properties(trits.device).total_memory
            if math.prod(self.target.shape) > KEPT_THERE * memory:
                return None
            try:
                self._there = torch.empty(self.target.shape, dtype=torch.int8, device=trits.device)
            except torch.OutOfMemoryError:
                return None
        return self._there[at].copy_(trits)

    def pack(self) -> RecordPieces:
        """The record of all matrices, which are then gone."""
        packed = RecordPieces.join(self.parts or [RecordPart.of(pack(self.matrices))])
        self.matrices.clear()
        self.parts.clear()
        self._trits = self._there = None
        return packed


@dataclass(frozen=True)
class Rounding:
    """Quantization by a method of `quantize.METHODS`."""

    spec: MethodSpec

    @property
    def needs_statistics(self) -> bool:
        return methods.METHODS[self.spec.method].needs_statistics

    @property
    def weighs_rows(self) -> bool:
        return isinstance(self.spec.format, methods.METHODS[self.spec.method].weighs_rows)

    def of_matrix(self, weight: torch.Tensor, tensor: str) -> tuple[Matrix, TensorReport]:
        return methods.quantize(weight, self.spec, tensor=tensor)

    def of_stack(self, weights: torch.Tensor, statistics: StackStatistics, tensor: str) -> Made:
        return list(methods.quantize_stack(weights, statistics, self.spec, tensor=tensor))

    def restore(self, made: Made, into: torch.Tensor) -> None:
        dequantize([matrix for matrix, _ in made], into)

    def locked_bytes(self, target: Target) -> int:
        return target.shape[1] * target.shape[2]  # codes

    def result(self, target: Target, reader: CheckedReader) -> PackedStack:
        return PackedStack(target, self, reader)
