"""What a budgeted allocation decides about: items, each of which gets one of its candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import QmoeError


@dataclass(frozen=True)
class Candidate:
    """One way to store an item.

    Attributes:
        nbytes: what it takes on the disk, all metadata included, exact or predicted.
        loss: predicted loss in any unit that adds up over items (for example nats per token of KL divergence). Smaller
            is better; measured losses may be slightly negative.
        settings: what a recipe rule says about it: "format", "method", "group" and so on; {"format": "keep"} for the
            original. Empty where the problem is abstract.
    """

    nbytes: int
    loss: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A tensor (or one matrix of it) and its candidates.

    Attributes:
        name: run-time name of the tensor. `role`: as in roles.py.
        weights: how many weights it has.
    """

    name: str
    weights: int
    candidates: tuple[Candidate, ...]
    role: str = "expert"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "candidates": [asdict(candidate) for candidate in self.candidates]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Item:
        """The inverse of `to_dict`."""
        return cls(**{**data, "candidates": tuple(Candidate(**entry) for entry in data["candidates"])})


@dataclass(frozen=True)
class Tables:
    """Candidates of n items as arrays (n, m); rows of fewer than m candidates are padded with unusable ones.

    Attributes:
        nbytes: (n, m) int64; padding has `PADDING` bytes. loss: (n, m) float64; padding is infinite.
    """

    nbytes: np.ndarray
    loss: np.ndarray

    # Far above any budget, and the sum of a million of them still fits int64.
    PADDING = 1 << 42

    @classmethod
    def of(cls, items: Sequence[Item]) -> Tables:
        """Raises `E_VALUE` for an item without candidates, or with negative bytes or a loss that is not finite."""
        width = max((len(item.candidates) for item in items), default=0)
        nbytes = np.full((len(items), width), cls.PADDING, dtype=np.int64)
        loss = np.full((len(items), width), np.inf)
        for row, item in enumerate(items):
            if not item.candidates:
                raise QmoeError("E_VALUE", "allocation: an item without candidates", tensor=item.name)
            count = len(item.candidates)
            nbytes[row, :count] = [candidate.nbytes for candidate in item.candidates]
            loss[row, :count] = [candidate.loss for candidate in item.candidates]
            sizes = nbytes[row, :count]
            if not np.isfinite(loss[row, :count]).all() or sizes.min() < 0 or sizes.max() >= cls.PADDING:
                raise QmoeError("E_VALUE", "allocation: sizes must be whole, losses finite", tensor=item.name)
        return cls(nbytes, loss)
