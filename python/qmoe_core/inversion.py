"""Run-time weights back into the checkpoint tensors that they were made of.

No inverse of any conversion is written here: the conversion itself, applied to the numbers of the source's elements
instead of to the elements, tells where each of them goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from .errors import QmoeError
from .families import Target


class Inversion:
    """Which source tensors the matrices of a target go back into.

    Attributes:
        whole: they do so all together only, as a stack; else one by one.
    """

    def __init__(self, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            shapes: of the source tensors, by name.

        Raises:
            QmoeError: `E_LAYOUT` for a conversion that does more than move elements, `E_SHAPE` where experts differ.
        """
        self.target = target
        self.whole = not target.sliceable
        self._pieces: list[tuple[str, tuple[int, ...]]] = []  # (pattern, shape) of the tensors of one unit, in order
        self._from: torch.Tensor | None = None  # place in the run-time matrix of each of their elements
        if target.converter is None:
            return
        parts: dict[str, list[torch.Tensor]] = {}
        count = 0
        for pattern, names in target.sources:
            if not self.whole and len({shapes[name] for name in names}) > 1:
                raise QmoeError("E_SHAPE", "experts have weights of different shapes", tensor=names[0])
            for name in names if self.whole else names[:1]:
                size = prod(shapes[name])
                parts.setdefault(pattern, []).append(torch.arange(count, count + size).view(shapes[name]))
                self._pieces.append((pattern, shapes[name]))
                count += size
        numbers = target.converted(parts)
        numbers = (numbers.mT if target.transposed else numbers).reshape(-1)
        places = torch.full((count,), -1)
        if len(numbers) == count:
            places[numbers] = torch.arange(count)
        if bool((places < 0).any()):
            raise QmoeError(
                "E_LAYOUT", "the loader does more with this weight than move its elements", tensor=target.name
            )
        self._from = places

    def of(self, first: int, matrices: torch.Tensor) -> Iterator[tuple[str, int | None, torch.Tensor]]:
        """The source tensors of matrices from number `first` on, (E', N, K), all of them where `whole`.

        Yields:
            The name, the slice of its first dimension (None: all of it), and the values as the source has them.
        """
        target = self.target
        if target.converter is None:
            (_, (name,)) = target.sources[0]
            for at, matrix in enumerate(matrices):
                index = first + at if target.kind == "experts" else None
                yield name, index, (matrix.mT if target.transposed else matrix).contiguous()
            return
        assert self._from is not None
        for at, unit in enumerate([matrices] if self.whole else matrices):
            flat, begin = unit.reshape(-1)[self._from.to(unit.device)], 0
            numbers: dict[str, int] = {}
            for pattern, shape in self._pieces:
                number = numbers.get(pattern, 0) if self.whole else first + at
                numbers[pattern] = number + 1
                yield dict(target.sources)[pattern][number], None, flat[begin : begin + prod(shape)].view(shape)
                begin += prod(shape)
