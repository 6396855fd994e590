"""Pruning as something that the calibrated pipeline does to a weight (`calibration/treatment.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..calibration.treatment import Made, StackResult
from ..errors import QmoeError
from ..families import Target
from ..inversion import Inversion
from ..quantize.base import StackStatistics, TensorReport
from ..quantize.feedback import output_error, sum_of_squares
from ..quantize.gptq import sampled_rows
from ..source import FLOAT_DTYPES, CheckedReader, SourceCheckpoint
from .maskfile import EncodedMask
from .methods import METHODS, prune_stack
from .patterns import Pattern
from .shards import RewrittenShards
from .spec import Pruned, PruneSpec


@dataclass(frozen=True)
class PrunedMatrix:
    """A matrix (N, K) on its way to the leading process, as arrays, of which only their own bytes travel.

    Attributes:
        data: uint8 (N, K * bytes of a number), in the type that the checkpoint has. mask: uint8, one bit per weight.
    """

    data: np.ndarray
    mask: np.ndarray


@dataclass
class PrunedStack(StackResult):
    """A pruned stack; what it is made of is in the output's files as soon as it comes.

    Attributes:
        written: source tensor -> CRC32C of what it has become.
    """

    shards: RewrittenShards | None = None
    inversion: Inversion | None = None
    dtype: torch.dtype = torch.float32
    written: dict[str, int] = field(default_factory=dict)
    _masks: list[np.ndarray] = field(default_factory=list)
    _waiting: list[torch.Tensor] = field(default_factory=list)  # where no matrix can be written before the others

    def add(self, made: PrunedMatrix) -> None:
        assert self.shards is not None and self.inversion is not None
        self._masks.append(made.mask)
        self._waiting.append(torch.from_numpy(made.data).view(self.dtype))
        if self.inversion.whole and len(self._masks) < self.target.shape[0]:
            return
        first = len(self._masks) - len(self._waiting)
        for name, index, values in self.inversion.of(first, torch.stack(self._waiting)):
            tensor = self.shards.checkpoint.tensors[name]
            self.written[name] = self.shards.write(tensor, index, values, self.written.get(name, 0))
        self._waiting.clear()

    def mask(self, pattern: Pattern) -> EncodedMask:
        """The mask of all matrices, which is then gone: (E, N, K), or (N, K) of a linear layer."""
        shape = self.target.shape if self.target.kind == "experts" else self.target.shape[1:]
        size = self.target.shape[1] * self.target.shape[2]

        def matrices() -> Iterator[torch.Tensor]:
            for packed in self._masks:
                bits = np.unpackbits(packed, count=size, bitorder="little")
                yield torch.from_numpy(bits.view(np.bool_)).view(self.target.shape[1:])

        encoded = EncodedMask.of_matrices(self.target.name, matrices, shape, pattern, self.target.transposed)
        self._masks.clear()
        return encoded


class Pruning:
    """Prunes one target by `spec`.

    Attributes:
        shards: the files that it goes into; to be set on the process that leads.
    """

    def __init__(self, target: Target, spec: PruneSpec, checkpoint: SourceCheckpoint) -> None:
        """Raises `E_DTYPE` for weights that are no floats, or of different types; `E_SHAPE`."""
        self.spec = spec
        self.shards: RewrittenShards | None = None
        tensors = [checkpoint.tensors[name] for name in target.source_names]
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) > 1 or not kinds <= FLOAT_DTYPES.keys():
            raise QmoeError("E_DTYPE", "only float weights of one type can be pruned", tensor=target.name,
                            expected=sorted(FLOAT_DTYPES), actual=sorted(kinds))  # fmt: skip
        try:
            spec.pattern.check_shape(target.shape)
        except QmoeError as error:
            raise error.locate(tensor=target.name) from None
        self.dtype = FLOAT_DTYPES[kinds.pop()]
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}

    @property
    def needs_statistics(self) -> bool:
        return METHODS[self.spec.method].needs_statistics

    @property
    def weighs_rows(self) -> bool:
        return False

    def of_matrix(
        self, weight: torch.Tensor, tensor: str, spec: PruneSpec | None = None
    ) -> tuple[PrunedMatrix, TensorReport]:
        """`spec`: instead of the target's, for a matrix with a sparsity of its own."""
        weights = weight[None]
        return self._made(weights, prune_stack(weights, spec or self.spec, tensor=tensor), None)[0]

    def of_stack(self, weights: torch.Tensor, statistics: StackStatistics, tensor: str) -> Made:
        return list(self._made(weights, prune_stack(weights, self.spec, statistics, tensor=tensor), statistics))

    def _made(
        self, weights: torch.Tensor, pruned: Pruned, statistics: StackStatistics | None
    ) -> list[tuple[PrunedMatrix, TensorReport]]:
        """Packs what was made for its way to the leading process, and compares it with the original."""
        values = pruned.weight.to(self.dtype)
        stored = values.float()
        residual = weights - stored
        errors, energies = [0.0] * len(weights), [0.0] * len(weights)
        if statistics is not None:
            per_token = 1.0 / statistics.tokens.clamp(min=1)
            rows = sampled_rows(weights.shape[1]).to(weights.device)
            part = weights.shape[1] / len(rows) * per_token
            errors = (output_error(residual[:, rows], statistics.hessian) * part).clamp(min=0).tolist()
            energies = (output_error(weights[:, rows], statistics.hessian) * part).clamp(min=0).tolist()
        squares, originals = sum_of_squares(residual).tolist(), sum_of_squares(weights).tolist()
        kept = pruned.mask.sum((1, 2)).tolist()
        host, masks = values.cpu().view(torch.uint8).numpy(), pruned.mask.cpu().numpy()
        size = weights[0].numel()
        return [
            (
                PrunedMatrix(host[e], np.packbits(masks[e].reshape(-1), bitorder="little")),
                TensorReport(
                    size, squares[e], originals[e], size - kept[e], {str(self.spec.pattern): 1}, errors[e], energies[e],
                    {pruned.notes[e]: 1} if pruned.notes[e] else {},
                ),
            )
            for e in range(len(weights))
        ]  # fmt: skip

    def restore(self, made: Made, into: torch.Tensor) -> None:
        for place, (matrix, _) in zip(into, made, strict=True):
            place.copy_(torch.from_numpy(matrix.data).view(self.dtype).to(into.device))

    def locked_bytes(self, target: Target) -> int:
        return 0

    def result(self, target: Target, reader: CheckedReader) -> PrunedStack:
        """Raises `E_LAYOUT`, `E_SHAPE` where it is not known how the weight goes back into the checkpoint."""
        inversion = None if self.shards is None else Inversion(target, self._shapes)
        return PrunedStack(target, self, reader, shards=self.shards, inversion=inversion, dtype=self.dtype)
