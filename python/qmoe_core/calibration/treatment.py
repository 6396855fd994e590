"""What the pipeline does to a weight. It knows no more of it than this: rounding (`Rounding`) is one such treatment,
pruning (`sparsify/treatment.py`) another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from .. import quantize as methods
from ..families import Target
from ..formats import IntMatrix, PackedTensor
from ..quantize import Matrix, MethodSpec, StackStatistics, TensorReport
from ..quantize.base import dequantized
from ..source import CheckedReader

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

    def take(self, parts: list[Made] | None) -> None:
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

    def restored(self, made: Any, device: torch.device | str) -> torch.Tensor:
        """The matrix to go on with, (N, K) float32."""

    def result(self, target: Target, reader: CheckedReader) -> StackResult:
        """An empty result for a stack."""


@dataclass
class PackedStack(StackResult):
    """Quantized matrices of a stack."""

    matrices: list[Matrix] = field(default_factory=list)

    _codes: np.ndarray | None = None  # of all matrices: one allocation, where many would leave memory full of holes

    def add(self, made: Matrix) -> None:
        if self.target.kind == "experts":
            if self._codes is None:
                self._codes = np.empty(self.target.shape, dtype=np.uint8)
            mine = self._codes[len(self.matrices)]
            if isinstance(made, IntMatrix):
                mine[:] = made.codes
                made.codes = mine
            else:
                mine[:] = made.trits.view(np.uint8)
                made.trits = mine.view(np.int8)
        self.matrices.append(made)

    def pack(self) -> PackedTensor:
        """The record of all matrices, which are then gone."""
        packed = PackedTensor.pack(self.matrices)
        self.matrices.clear()
        self._codes = None
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

    def restored(self, made: Matrix, device: torch.device | str) -> torch.Tensor:
        return dequantized(made, device)

    def result(self, target: Target, reader: CheckedReader) -> PackedStack:
        return PackedStack(target, self, reader)
