"""Sparse from the first step: static masks, and masks whose connections move (SET, RigL)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import QmoeError
from .masks import kept_count, mask_of_count
from .pruners import random_scores
from .state import SparseState, map_param_like
from .trees import Tree, by_key, map_leaves
from .types import NByM, Unstructured
from .updater import BaseUpdater


@dataclass
class StaticRandomSparse(BaseUpdater):
    """Random masks that stay as they are.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import StaticRandomSparse, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = StaticRandomSparse(sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.adam(0.1)).init(params)
        >>> int(state.masks["kernel"].sum())
        2
    """

    is_sparse_gradients: bool = True

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        return sparse_state

    def get_initial_masks(self, params: Tree, target_sparsities: Tree) -> Tree:
        return self.create_masks(random_scores(params, self.rng), target_sparsities)

    def instant_sparsify(self, params: Tree, grads: Tree = None, **kwargs: Any) -> tuple[Tree, Tree]:
        raise QmoeError("E_VALUE", "sparse training begins with random masks; it has none to prune trained weights by")


def _constant_fraction(step: Any) -> float:
    return 0.3


@dataclass
class SET(StaticRandomSparse):
    """Every update drops the smallest kept weights and grows as many others at random (arXiv 1707.04780).

    Grown weights start at zero, and so does all that the optimizer knows of them. Masks keep their number of weights
    exactly. n:m has no weights to move one by one, and is refused.

    Attributes:
        drop_fraction_fn: step -> share of the kept weights that is dropped. 0.3; made from a configuration, a cosine
            from 0.1 to 0 at the last update.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import SET, PeriodicSchedule, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = SET(PeriodicSchedule(10, 0, 100), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.adam(0.1)).init(params)
        >>> int(state.masks["kernel"].sum())
        2
    """

    drop_fraction_fn: Callable[[Any], Any] = _constant_fraction
    skip_gradients: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparsity_type, NByM):
            raise QmoeError("E_VALUE", f"{type(self).__name__} cannot move weights of n:m masks one by one")

    def drop_scores(self, sparse_state: SparseState, params: Tree, grads: Tree) -> Tree:
        """What kept weights are worth."""
        return jax.tree.map(jnp.abs, params)

    def grow_scores(self, sparse_state: SparseState, params: Tree, grads: Tree) -> Tree:
        """What weights that are not kept are worth."""
        return random_scores(params, jax.random.fold_in(self.rng, sparse_state.count))

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        masks = self.unpacked_masks(sparse_state, params)
        fraction = self.drop_fraction_fn(sparse_state.count)
        drop = self.drop_scores(sparse_state, params, grads)
        grow = self.grow_scores(sparse_state, params, grads)
        new = map_leaves(
            lambda mask, d, g: None if mask is None else self._moved(mask, d, g, fraction), masks, drop, grow
        )
        return sparse_state._replace(masks=self._stored(new))

    def settle(self, old: SparseState, new: SparseState, params: Tree) -> SparseState:
        before, after = (by_key(self.unpacked_masks(state, params)) for state in (old, new))

        def restarted(key: Any, leaf: jax.Array) -> jax.Array:
            if after[key] is None:
                return leaf
            return jnp.where((before[key] == 0) & (after[key] == 1), jnp.zeros((), leaf.dtype), leaf)

        return new._replace(inner_state=map_param_like(restarted, new.inner_state, params))

    def _moved(self, mask: jax.Array, drop: jax.Array, grow: jax.Array, fraction: Any) -> jax.Array:
        kept = jnp.sum(mask, dtype=jnp.int32)
        density = kept.astype(jnp.float32) / mask.size
        remaining = self._top(jnp.where(mask == 0, -jnp.inf, drop), density * (1 - fraction))
        scores = jnp.where(remaining == 1, jnp.inf, grow)
        if isinstance(self.sparsity_type, Unstructured):
            return mask_of_count(scores, kept)
        return self._top(scores, density)

    def _top(self, scores: jax.Array, density: Any) -> jax.Array:
        if isinstance(self.sparsity_type, Unstructured):
            return mask_of_count(scores, kept_count(scores.size, 1 - density))
        topk = self.topk_fn
        assert topk is not None
        return topk(scores, 1 - density)


@dataclass
class RigL(SET):
    """SET that grows where the gradient of the loss is largest (arXiv 1911.11134). It wants the gradients of pruned
    weights too, so those that `update` gets must not be masked before.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import RigL, PeriodicSchedule, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = RigL(PeriodicSchedule(10, 0, 100), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.adam(0.1)).init(params)
        >>> int(state.masks["kernel"].sum())
        2
    """

    def grow_scores(self, sparse_state: SparseState, params: Tree, grads: Tree) -> Tree:
        return jax.tree.map(jnp.abs, grads)
