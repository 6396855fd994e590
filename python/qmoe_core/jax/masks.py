"""Masks from scores: 1 for what is kept, uint8, in the shape of the scores. Everything works under `jax.jit`.

Masks equal JaxPruner's, ties included, but for what docs/jax.md lists. The k-th largest score is not sorted for but
searched between counts, which on a CPU is sixty times as fast (25 million float32: 0.15 s against 9.8 s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import QmoeError
from .trees import Tree, map_leaves
from .types import Block, Channel, NByM, SparsityType, Unstructured, positive_axis

MASK_DTYPE = jnp.uint8
TopKFn = Callable[[Any, Any], jax.Array]
_SAMPLE = 1024  # keys that tell about where the k-th largest is
_ROWS = 64  # that are counted by themselves
_SMALL_GROUP = 8  # n:m up to this m compares all pairs, which needs no sort


def _ordered(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the scores, as wide as these. NaN comes first, -0.0 equals 0.0."""
    if jnp.issubdtype(scores.dtype, jnp.unsignedinteger):
        return scores
    if scores.dtype == jnp.bool_:
        return scores.astype(jnp.uint8)
    width = 8 * scores.dtype.itemsize
    unsigned: Any = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
    sign = jnp.array(1 << (width - 1), unsigned)
    if jnp.issubdtype(scores.dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(scores, unsigned) ^ sign
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, jnp.zeros_like(scores), scores), unsigned)
    return jnp.where(jnp.isnan(scores), jnp.zeros_like(bits), jnp.where(bits >= sign, ~bits, bits | sign))


def _reached(keys: jax.Array, thresholds: Sequence[jax.Array]) -> jax.Array:
    """How many keys reach each threshold, int32. One reduction of several numbers, which XLA makes one loop that goes
    through the keys once; by rows, which its threads share."""
    zeros = (jnp.int32(0),) * len(thresholds)
    rows = keys.reshape(gcd(keys.size, _ROWS), -1)
    flags = tuple((rows >= threshold).astype(jnp.int32) for threshold in thresholds)
    add = lambda sums, more: tuple(a + b for a, b in zip(sums, more, strict=True))  # noqa: E731
    return jnp.stack(jax.lax.reduce(flags, zeros, add, (1,))).sum(1)


class _Bracket(NamedTuple):
    """Where the k-th largest key is: in [low, high], and how many keys reach low, and a number above high. At least k
    reach low; where they are k, low is as good as the key itself."""

    low: jax.Array
    high: jax.Array
    reaching: jax.Array
    above: jax.Array
    step: jax.Array


def _largest(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Which of the keys (size,) are the `count` largest, at least one; of equal ones the first. bool (size,)."""
    one = jnp.ones((), keys.dtype)

    def narrow(state: _Bracket, probes: list[jax.Array]) -> _Bracket:
        """What lies between two of some ascending probes."""
        reached = _reached(keys, probes)
        place = jnp.sum(reached >= count)  # so many of the probes may be low
        lows, highs = jnp.stack([state.low, *probes]), jnp.stack([*(probe - one for probe in probes), state.high])
        counts = jnp.concatenate([state.reaching[None], reached, state.above[None]])
        return _Bracket(lows[place], highs[place], counts[place], counts[place + 1], state.step + 1)

    def closer(state: _Bracket) -> _Bracket:
        # In turn where it would be were keys spread evenly, give or take what chance does to that, and, whatever they
        # are like, to a quarter.
        width = state.high - state.low
        between = (state.reaching - state.above).astype(jnp.float32)
        middle, give = (state.reaching - count + 0.5) / between, jax.lax.rsqrt(between)
        even = state.step % 2 == 0
        parts = [jnp.where(even, 0.25 * i, middle + (i - 2) * give) for i in (1, 2, 3)]
        ways = [(jnp.clip(part, 0, 1) * width.astype(jnp.float32)).astype(keys.dtype) for part in parts]
        return narrow(state, [state.low + jnp.clip(way, one, width) for way in ways])

    def undecided(state: _Bracket) -> jax.Array:
        return (state.low < state.high) & (state.reaching != count)

    # Some of the keys tell about where: a first look at what is left and right of there saves most of the others.
    sample = jnp.sort(keys[:: max(1, keys.size // _SAMPLE)])
    place = (1 - count / keys.size) * (sample.size - 1)
    around = [jnp.round(place + spread * sample.size**0.5).astype(jnp.int32) for spread in (-1.0, 0.0, 1.0)]
    probes = [jnp.maximum(sample[jnp.clip(at, 0, sample.size - 1)], one) for at in around]
    most = jnp.array(jnp.iinfo(keys.dtype).max, keys.dtype)
    everything = _Bracket(jnp.zeros((), keys.dtype), most, jnp.int32(keys.size), jnp.int32(0), jnp.int32(0))
    threshold, _, reaching, *_ = jax.lax.while_loop(undecided, closer, narrow(everything, probes))

    def first_of_equals() -> jax.Array:
        above, level = keys > threshold, keys == threshold
        left = count - jnp.sum(above, dtype=jnp.int32)
        return above | (level & (jnp.cumsum(level, dtype=jnp.int32) <= left))

    return jax.lax.cond(reaching == count, lambda: keys >= threshold, first_of_equals)


def kept_count(size: int, sparsity: Any) -> jax.Array:
    """How many of `size` weights a sparsity keeps: rounded half to even in float32, and at least one. int32."""
    return jnp.maximum(1, jnp.round(size * (1 - sparsity)).astype(jnp.int32))


@jax.jit
def mask_of_count(scores: jax.Array, count: Any) -> jax.Array:
    """The `count` largest scores; of equal ones those of lower index. Raises `E_LIMIT` above 2^31 - 1 scores."""
    if scores.size >= 1 << 31:
        raise QmoeError("E_LIMIT", "too many scores to count in int32", actual=scores.size)
    keys = _ordered(scores).reshape(-1)
    return _largest(keys, jnp.asarray(count, jnp.int32)).reshape(scores.shape).astype(MASK_DTYPE)


@partial(jax.jit, static_argnames="axes")
def _per_group(scores: jax.Array, sparsity: Any, axes: tuple[int, ...]) -> jax.Array:
    """Unstructured among the scores that share indices of the other axes than `axes`."""
    moved = jnp.moveaxis(scores, axes, range(-len(axes), 0))
    keys = _ordered(moved).reshape(-1, prod(moved.shape[moved.ndim - len(axes) :]))
    count = kept_count(keys.shape[1], sparsity)
    kept = jax.vmap(_largest, (0, None))(keys, count).reshape(moved.shape)
    return jnp.moveaxis(kept, range(-len(axes), 0), axes).astype(MASK_DTYPE)


@jax.jit
def _unstructured(scores: jax.Array, sparsity: Any) -> jax.Array:
    return mask_of_count(scores, kept_count(scores.size, sparsity))


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_by_m(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """n of every m; of equal scores those of higher index. Raises `E_SHAPE` if m does not divide the axis."""
    axis = positive_axis(axis, scores.shape)
    if scores.shape[axis] % m:
        raise QmoeError("E_SHAPE", f"axis {axis} is not divisible by {m}", actual=scores.shape)
    groups = jnp.moveaxis(_ordered(scores), axis, 0).reshape(-1, m, *_without(scores.shape, axis))
    if m <= _SMALL_GROUP:
        parts = [groups[:, i] for i in range(m)]
        better = [jnp.zeros(parts[0].shape, jnp.int8) for _ in range(m)]  # how many of its group go before each
        for i in range(m):
            for j in range(i):
                wins = parts[j] > parts[i]
                better[i] += wins.astype(jnp.int8)
                better[j] += (~wins).astype(jnp.int8)
        kept = jnp.stack([count < n for count in better], axis=1)
    else:
        kept = groups.argsort(axis=1).argsort(axis=1) >= m - n
    return jnp.moveaxis(kept.reshape(-1, *_without(scores.shape, axis)), 0, axis).astype(MASK_DTYPE)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


@partial(jax.jit, static_argnames=("block_shape", "mean"))
def _blocks(scores: jax.Array, sparsity: Any, block_shape: tuple[int, int], mean: bool) -> jax.Array:
    matrix = scores.reshape(1, -1) if scores.ndim < 2 else scores
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        matrix = matrix.astype(jnp.float32)
    rows, columns = matrix.shape[:2]
    window = (*block_shape, *matrix.shape[2:])
    padding = [(0, -size % side) for size, side in zip(matrix.shape, window, strict=True)]
    if mean:
        pooled = jax.lax.reduce_window(matrix, jnp.zeros((), matrix.dtype), jax.lax.add, window, window, padding)
        if any(after for _, after in padding):  # blocks at the ends are smaller
            ones = jnp.ones(matrix.shape, jnp.float32)
            sizes = jax.lax.reduce_window(ones, jnp.float32(0), jax.lax.add, window, window, padding)
            pooled = pooled / sizes.astype(pooled.dtype)
    else:
        lowest = jnp.array(-jnp.inf, matrix.dtype)
        pooled = jax.lax.reduce_window(matrix, lowest, jax.lax.max, window, window, padding)
    kept = _unstructured(pooled.reshape(pooled.shape[:2]), sparsity)
    kept = jnp.repeat(jnp.repeat(kept, block_shape[0], axis=0)[:rows], block_shape[1], axis=1)[:, :columns]
    kept = kept.reshape(*kept.shape, *(1,) * (matrix.ndim - 2))
    return jnp.broadcast_to(kept, matrix.shape).reshape(scores.shape)


@partial(jax.jit, static_argnames="axis")
def _channels(scores: jax.Array, sparsity: Any, axis: int) -> jax.Array:
    axis = positive_axis(axis, scores.shape)
    others = tuple(i for i in range(scores.ndim) if i != axis)
    kept = _unstructured(jnp.sum(scores, axis=others, keepdims=True), sparsity)
    return jnp.broadcast_to(kept, scores.shape)


def _unless_dense(function: TopKFn, scores: Any, sparsity: Any) -> jax.Array:
    """All ones where the sparsity is 0, which is where schedules begin; no search is done for that."""
    scores = jnp.asarray(scores)
    if isinstance(sparsity, (int, float)):
        return jnp.ones(scores.shape, MASK_DTYPE) if sparsity == 0 else function(scores, jnp.float32(sparsity))
    return jax.lax.cond(
        jnp.asarray(sparsity) == 0, lambda s, _: jnp.ones(s.shape, MASK_DTYPE), function, scores, sparsity
    )


def get_topk_fn(sparsity_type: SparsityType | type) -> TopKFn:
    """What makes masks of a type: (scores, sparsity) -> mask. With n:m any sparsity but 0 means n:m.

    Raises:
        QmoeError: `E_UNKNOWN`; the function raises `E_SHAPE` where the type does not divide the scores.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import NByM, get_topk_fn
        >>> print(get_topk_fn(NByM(1, 2))(jnp.array([[3.0, 1.0, 2.0, 2.0]]), 0.5))
        [[1 0 0 1]]
    """
    if isinstance(sparsity_type, type) and issubclass(sparsity_type, Unstructured):
        sparsity_type = sparsity_type()
    if isinstance(sparsity_type, Unstructured):
        function: TopKFn = _unstructured
    elif isinstance(sparsity_type, NByM):
        n, m, axis = sparsity_type.n, sparsity_type.m, sparsity_type.axis
        function = lambda scores, sparsity: n_by_m(scores, n, m, axis)  # noqa: E731
    elif isinstance(sparsity_type, Block):
        function = partial(_blocks, block_shape=sparsity_type.block_shape, mean=sparsity_type.use_avg_pooling)
    elif isinstance(sparsity_type, Channel):
        function = partial(_channels, axis=sparsity_type.axis)
    else:
        raise QmoeError("E_UNKNOWN", "not a sparsity type", actual=repr(sparsity_type))
    return partial(_unless_dense, function)


def per_output(scores: Any, sparsity: Any, output_axes: Sequence[int] = (-1,)) -> jax.Array:
    """Unstructured, with the same sparsity for every output, as Wanda prunes."""
    scores = jnp.asarray(scores)
    outputs = {positive_axis(axis, scores.shape) for axis in output_axes}
    axes = tuple(axis for axis in range(scores.ndim) if axis not in outputs)
    if not axes:
        raise QmoeError("E_SHAPE", "all axes are of outputs, none of inputs", actual=scores.shape)
    return _unless_dense(partial(_per_group, axes=axes), scores, sparsity)


def apply_mask(param: Any, mask: Any, is_packed: bool = False) -> Any:
    """The parameter with zeros where the mask has zeros, whatever was there (NaN, too). A mask of None keeps all."""
    if mask is None or param is None:
        return param
    return jnp.where(unpack_mask(mask, param.shape) if is_packed else mask, param, jnp.zeros((), param.dtype))


def unpack_mask(mask: jax.Array, shape: Sequence[int]) -> jax.Array:
    """One mask of `pack_masks`, in its shape."""
    return jnp.unpackbits(mask, count=prod(shape)).reshape(tuple(shape))


def pack_masks(masks: Tree) -> Tree:
    """Eight weights per byte, the first in the highest bit: uint8 (ceil(size / 8),) for every mask."""
    return map_leaves(lambda mask: None if mask is None else jnp.packbits(mask), masks)


def unpack_masks(masks: Tree, params: Tree) -> Tree:
    """What `pack_masks` packed, in the shapes of the parameters."""
    return map_leaves(lambda param, mask: None if mask is None else unpack_mask(mask, param.shape), params, masks)
