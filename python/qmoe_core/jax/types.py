"""Which weights may be zero together. The names, arguments and texts are those of JaxPruner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import QmoeError


@dataclass(frozen=True)
class Unstructured:
    """Any weights of an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import Unstructured, get_topk_fn
        >>> get_topk_fn(Unstructured())(jnp.array([[1.0, 9.0], [2.0, 1.0]]), 0.5).tolist()
        [[0, 1], [1, 0]]
    """


@dataclass(frozen=True)
class NByM:
    """n of every m neighbours along `axis` are kept; of equal scores the higher index wins.

    The sparse matrix units of GPUs want 2:4 along the inputs. Kernels of flax are (inputs, outputs): `axis=-2`.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import NByM, get_topk_fn
        >>> get_topk_fn(NByM(2, 4))(jnp.array([[1.0, 9.0, 2.0, 1.0]]), 0.5).tolist()
        [[0, 1, 1, 0]]
    """

    n: int
    m: int
    axis: int = -1

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if not 0 < self.n <= self.m:
            raise QmoeError("E_VALUE", "n:m keeps n of m, 0 < n <= m", actual=f"{self.n}:{self.m}")


@dataclass(frozen=True)
class Block:
    """Blocks of the first two axes are kept or not as a whole, by the mean or the maximum of their scores; further
    axes belong to the block. At the ends blocks may be smaller.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import Block, get_topk_fn
        >>> get_topk_fn(Block((1, 2)))(jnp.array([[1.0, 2.0, 5.0, 1.0]]), 0.5).tolist()
        [[0, 0, 1, 1]]
    """

    block_shape: tuple[int, int]
    use_avg_pooling: bool = True

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        if len(self.block_shape) != 2 or min(self.block_shape) < 1:
            raise QmoeError("E_VALUE", "blocks have two sides of at least 1", actual=self.block_shape)


@dataclass(frozen=True)
class Channel:
    """Everything at one index of `axis` is kept or not as a whole, by the sum of its scores.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import Channel, get_topk_fn
        >>> get_topk_fn(Channel())(jnp.array([[1.0, 9.0], [2.0, 1.0]]), 0.5).tolist()
        [[0, 1], [0, 1]]
    """

    axis: int = -1


SparsityType = Unstructured | NByM | Block | Channel

_TEXTS = {
    "nm": re.compile(r"(?:nm_)?(\d+)\s*[:,]\s*(\d+)"),
    "block": re.compile(r"(?:block[_:])?(\d+)\s*[x,]\s*(\d+)"),
    "channel": re.compile(r"channel_(-?\d+)"),
}


def parse_type(text: str) -> SparsityType:
    """A type from `unstructured`, `nm_2,4` or `2:4`, `block_4,4` or `4x4`, `channel_0`.

    Raises:
        QmoeError: `E_UNKNOWN`, or `E_VALUE` for numbers that make no sense.

    Example:
        >>> from qmoe_core.jax import parse_type
        >>> parse_type("2:4") == parse_type("nm_2,4"), parse_type("block_4,2")
        (True, Block(block_shape=(4, 2), use_avg_pooling=True))
    """
    text = text.strip()
    if text == "unstructured":
        return Unstructured()
    if match := _TEXTS["nm"].fullmatch(text):
        return NByM(int(match[1]), int(match[2]))
    if match := _TEXTS["block"].fullmatch(text):
        return Block((int(match[1]), int(match[2])))
    if match := _TEXTS["channel"].fullmatch(text):
        return Channel(int(match[1]))
    raise QmoeError(
        "E_UNKNOWN", "unknown sparsity type", expected="unstructured, nm_N,M, block_H,W or channel_AXIS", actual=text
    )


def positive_axis(axis: int, shape: Sequence[int]) -> int:
    """The axis counted from the front. Raises `E_SHAPE` if there is none."""
    if not -len(shape) <= axis < len(shape):
        raise QmoeError("E_SHAPE", f"there is no axis {axis}", actual=tuple(shape))
    return axis % len(shape)
