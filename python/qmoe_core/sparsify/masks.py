"""Masks: which weights of which tensors are kept. Everything in `qmoe_core.sparsify` makes or takes them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import QmoeError
from ..store import write_atomic
from .maskfile import EncodedMask, MaskFile, write_masks
from .patterns import Pattern, Unstructured, as_stack

_NPZ_KEY = "__qmoe_masks__"  # of the JSON beside the arrays: name -> [pattern, transposed]


@dataclass(frozen=True)
class MaskEntry:
    """One mask in numbers.

    Attributes:
        name, shape, pattern: of the mask. weights: how many it is for; zeros: how many of them are not kept.
        bits_per_weight: what the mask itself takes in a file.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Masks
        >>> entry = Masks({"w": torch.eye(4, dtype=torch.bool)}).report()[0]
        >>> entry.pattern, entry.zeros, entry.sparsity, entry.bits_per_weight
        ('unstructured', 12, 0.75, 1.0)
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    weights: int
    zeros: int
    bits_per_weight: float

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


class Masks(Mapping[str, torch.Tensor]):
    """Masks by parameter name: bool tensors (N, K), or (E, N, K) for a stack of experts; True: kept.

    The last dimension is always in_features, also where a model's own parameter is (E, K, N), as in gpt-oss: such names
    are in `transposed`, and `apply` turns their masks around.

    Attributes:
        patterns: name -> `Pattern` that the mask was made for. transposed: names whose parameters are the other way
            around.

    Example:
        >>> import torch
        >>> from qmoe_core.sparsify import Masks, Pattern
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> pattern = Pattern.parse("2:4")
        >>> masks = Masks({"weight": pattern.select(layer.weight.abs())}, {"weight": pattern})
        >>> masks.apply(layer)
        >>> masks.sparsity(), int((layer.weight == 0).sum())
        (0.5, 8)
    """

    def __init__(
        self,
        masks: Mapping[str, torch.Tensor],
        patterns: Mapping[str, Pattern] | Pattern | None = None,
        transposed: Iterable[str] = (),
    ) -> None:
        """
        Args:
            masks: bool tensors by name; not copied.
            patterns: by name, or one for all; unstructured where there is none.

        Raises:
            QmoeError: `E_DTYPE`, `E_SHAPE`, `E_MISSING` (a pattern or orientation for an unknown name).
        """
        given = patterns if isinstance(patterns, Mapping) else {}
        default = patterns if isinstance(patterns, Pattern) else Unstructured()
        self._masks = dict(masks)
        self.patterns: dict[str, Pattern] = {name: given.get(name, default) for name in masks}
        self.transposed = frozenset(transposed)
        for name in {*given, *self.transposed} - set(self._masks):
            raise QmoeError("E_MISSING", "no mask of this name", tensor=name)
        for name, mask in self._masks.items():
            if mask.dtype != torch.bool:
                raise QmoeError("E_DTYPE", "masks are bool", tensor=name, expected="torch.bool", actual=str(mask.dtype))
            try:
                as_stack(mask)
            except QmoeError as error:
                raise error.locate(tensor=name) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({str(pattern) for pattern in self.patterns.values()}))
        return f"Masks({len(self)} tensors, {kinds}, {self.sparsity():.1%} zeros)"

    def oriented(self, name: str) -> torch.Tensor:
        """The mask in the shape of the parameter itself."""
        mask = self._masks[name]
        return mask.mT if name in self.transposed else mask

    @torch.no_grad()
    def apply(self, to: nn.Module | Mapping[str, torch.Tensor]) -> None:
        """Sets the weights that are not kept to zero, in place; NaN and infinity there, too.

        Args:
            to: a model whose parameters, or a state dict whose tensors, have the names of the masks.

        Raises:
            QmoeError: `E_MISSING`, `E_SHAPE`; then nothing is changed.
        """
        tensors: Mapping[str, Any] = (
            dict(to.named_parameters(remove_duplicate=False)) if isinstance(to, nn.Module) else to
        )
        for name in self:
            if name not in tensors:
                raise QmoeError("E_MISSING", "nothing of this name to apply a mask to", tensor=name)
            expected = tuple(self.oriented(name).shape)
            if tuple(tensors[name].shape) != expected:
                raise QmoeError("E_SHAPE", "a mask for another shape", tensor=name, expected=expected,
                                actual=tuple(tensors[name].shape))  # fmt: skip
        for name in self:
            tensors[name].masked_fill_(~self.oriented(name).to(tensors[name].device), 0)

    def sparsity(self) -> float:
        """The share of all masked weights that are not kept; 0 where there are no masks."""
        weights = sum(mask.numel() for mask in self._masks.values())
        kept = sum(int(mask.sum()) for mask in self._masks.values())
        return 1.0 - kept / weights if weights else 0.0

    def report(self) -> list[MaskEntry]:
        """Every mask in numbers."""
        return [
            MaskEntry(
                name,
                tuple(mask.shape),
                str(self.patterns[name]),
                mask.numel(),
                int((~mask).sum()),
                8 * EncodedMask.of(name, mask, self.patterns[name]).data.nbytes / mask.numel(),
            )
            for name, mask in self._masks.items()
        ]

    def check(self) -> None:
        """Raises `E_VALUE` for a mask that does not consist of whole units of its pattern."""
        for name, mask in self._masks.items():
            if not self.patterns[name].fits(mask):
                raise QmoeError("E_VALUE", f"the mask is not {self.patterns[name]}", tensor=name)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self._masks.items()}, self.patterns, self.transposed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file (`maskfile.py`), whole or not at all. 2:4 takes 0.667 bits per weight, other
        patterns at most 1. Raises `E_NO_SPACE`, `E_IO`."""
        encoded = [
            EncodedMask.of(name, mask, self.patterns[name], name in self.transposed)
            for name, mask in self._masks.items()
        ]
        write_masks(Path(path), [mask.info for mask in encoded], (mask.data for mask in encoded))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what `save` wrote; to read parts of it, see `MaskFile`. Raises as that does."""
        with MaskFile(path) as file:
            masks = {name: file.read(name) for name in file.infos}
            return cls(
                masks,
                {name: info.pattern for name, info in file.infos.items()},
                [name for name, info in file.infos.items() if info.transposed],
            )

    def to_npz(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed npz file of bool arrays by name, for numpy and JAX. Raises `E_NO_SPACE`, `E_IO`."""
        kinds = {name: [str(self.patterns[name]), name in self.transposed] for name in self}
        arrays: dict[str, np.ndarray] = {name: mask.cpu().numpy() for name, mask in self._masks.items()}
        arrays[_NPZ_KEY] = np.array(json.dumps(kinds))
        import io

        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(Path(path), buffer.getvalue())

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads an npz file of arrays of bool, or of 0 and 1 in any integer type, by name; unstructured where it is not
        one of ours. Nothing in it is executed.

        Raises:
            QmoeError: `E_MISSING`, `E_CORRUPT` (no npz file, damaged), `E_DTYPE`, `E_SHAPE`, `E_VALUE` (neither 0 nor
                1).
        """
        if not Path(path).exists():
            raise QmoeError("E_MISSING", "no such file", file=path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            kinds = json.loads(str(arrays.pop(_NPZ_KEY))) if _NPZ_KEY in arrays else {}
            patterns = {name: Pattern.parse(text) for name, (text, _) in kinds.items()}
            transposed = [name for name, (_, flipped) in kinds.items() if flipped]
        except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise QmoeError("E_CORRUPT", f"this is no npz file of masks: {error}", file=path) from error
        try:
            return cls({name: _boolean(name, array) for name, array in arrays.items()}, patterns, transposed)
        except QmoeError as error:
            raise error.locate(file=path) from None


def _boolean(name: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.integer):
        raise QmoeError("E_DTYPE", "masks are bool or integers", tensor=name, actual=str(array.dtype))
    values = array.astype(np.bool_)
    if array.dtype != np.bool_ and prod(array.shape) and not np.array_equal(values, array):
        raise QmoeError("E_VALUE", "a mask holds 0 and 1", tensor=name, actual=f"{array.min()} to {array.max()}")
    return torch.from_numpy(values)
