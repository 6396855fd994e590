"""Bytes of masks: whole groups of n:m as digits where that is smaller, else one bit per weight.

digits    A group of n:m is one of C = C(m, n) candidates (`NM.candidates`, in that order), and as many groups as fit
          are one byte, the first being its lowest digit in base C. 2:4: 3 groups (6^3 = 216 <= 256), 0.667 bits per
          weight, where the entropy of a random mask is 0.646. Group g is in byte g // 3, so any part can be read alone.
bits      Weight i is bit i % 8 of byte i // 8.

Both go through a tensor's weights in row-major order; what is left of the last byte is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import comb

import numpy as np

from ..errors import QmoeError
from .patterns import NM, Pattern


@cache
def digits_of(pattern: Pattern) -> Digits | None:
    """The coding by digits, where it takes less than a bit per weight."""
    if not isinstance(pattern, NM) or pattern.m > 16 or comb(pattern.m, pattern.n) > 256:
        return None
    base, groups = comb(pattern.m, pattern.n), 1
    while base ** (groups + 1) <= 256:
        groups += 1
    return Digits(pattern, base, groups) if groups * pattern.m > 8 else None


@dataclass(frozen=True)
class Digits:
    """`groups` groups per byte, each a digit in base `base`."""

    pattern: NM
    base: int
    groups: int

    @property
    def weights(self) -> int:
        """Weights per byte."""
        return self.groups * self.pattern.m

    def encode(self, mask: np.ndarray) -> np.ndarray:
        """A flat bool mask that fits the pattern, as uint8."""
        m = self.pattern.m
        table = np.zeros(1 << m, dtype=np.uint8)
        places = 1 << np.arange(m)
        table[self.pattern.candidates().numpy() @ places] = np.arange(self.base)
        digits = np.zeros(-(-mask.size // self.weights) * self.groups, dtype=np.uint8)
        digits[: mask.size // m] = table[mask.reshape(-1, m) @ places]
        powers = (self.base ** np.arange(self.groups)).astype(np.uint8)
        return np.add.reduce(digits.reshape(-1, self.groups) * powers, axis=1, dtype=np.uint8)

    def decode(self, data: np.ndarray, count: int) -> np.ndarray:
        """The first `count` weights (whole groups) of uint8 data, as bool. Raises `E_CORRUPT` for a byte that is no
        `groups` digits."""
        limit = self.base**self.groups
        if limit < 256 and data.size and int(data.max()) >= limit:
            at = int(np.argmax(data >= limit))
            raise QmoeError("E_CORRUPT", "a byte of a mask is out of range", offset=at, expected=f"< {limit}",
                            actual=int(data[at]))  # fmt: skip
        # Every byte's weights at once: 256 x weights bool is a small table.
        codes = np.arange(limit)[:, None] // self.base ** np.arange(self.groups) % self.base
        table = self.pattern.candidates().numpy()[codes].reshape(limit, self.weights)
        whole = table[data].reshape(-1)
        padding = data[-1] // self.base ** ((count % self.weights) // self.pattern.m) if count % self.weights else 0
        if padding:
            raise QmoeError("E_CORRUPT", "a mask's last byte has digits behind its end", actual=int(padding))
        return whole[:count]


PIECE = 1 << 24  # weights that are coded at a time: indices of groups take eight times as many bytes


def encode(parts: Iterable[np.ndarray], digits: Digits | None) -> np.ndarray:
    """A mask as uint8, from flat bool parts that follow each other; memory holds a part, and little besides."""
    unit = 8 if digits is None else digits.weights
    coded: list[np.ndarray] = []
    left = np.empty(0, dtype=np.bool_)  # behind the last whole byte

    def code(mask: np.ndarray) -> None:
        coded.append(np.packbits(mask, bitorder="little") if digits is None else digits.encode(mask))

    for part in parts:
        if left.size:
            missing = min(unit - left.size, part.size)
            left, part = np.concatenate([left, part[:missing]]), part[missing:]
            if left.size < unit:
                continue
            code(left)
        whole = part.size // unit * unit
        for first in range(0, whole, PIECE // unit * unit):
            code(part[first : min(first + PIECE // unit * unit, whole)])
        left = part[whole:]
    if left.size:
        code(left)
    return np.concatenate(coded) if coded else np.empty(0, dtype=np.uint8)


def encoded_size(count: int, digits: Digits | None) -> int:
    """Bytes of a mask of `count` weights."""
    return -(-count // (8 if digits is None else digits.weights))


def decode(data: np.ndarray, count: int, digits: Digits | None) -> np.ndarray:
    """A whole mask of `count` weights from all of its bytes. Raises `E_CORRUPT`."""
    if digits is not None:
        return digits.decode(data, count)
    bits = np.unpackbits(data, bitorder="little")
    if bits[count:].any():
        raise QmoeError("E_CORRUPT", "a mask's last byte has bits behind its end")
    return bits[:count].view(np.bool_)
