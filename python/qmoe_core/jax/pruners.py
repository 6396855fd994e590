"""Pruning while training: dense at first, sparser by the schedule; straight-through estimators; global pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import QmoeError
from .distributions import FilterFn, check_sparsity, custom_sparsities, not_dim_one
from .masks import MASK_DTYPE
from .state import SparseState
from .trees import Key, Tree, keyed_leaves, map_leaves
from .types import Unstructured
from .updater import BaseUpdater


@dataclass
class MagnitudePruning(BaseUpdater):
    """The smallest weights go.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import MagnitudePruning, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = MagnitudePruning(sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> _, masks = pruner.instant_sparsify(params)
        >>> masks["kernel"].tolist()
        [[1, 0], [0, 1]]
    """

    def calculate_scores(
        self, params: Tree, sparse_state: SparseState | None = None, grads: Tree = None, **kwargs: Any
    ) -> Tree:
        return jax.tree.map(jnp.abs, params)


@dataclass
class SaliencyPruning(BaseUpdater):
    """The weights go whose loss would change least to first order: |weight x gradient|.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import SaliencyPruning, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> grads = {"kernel": jnp.array([[0.0, 5.0], [1.0, 0.0]])}
        >>> pruner = SaliencyPruning(sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> _, masks = pruner.instant_sparsify(params, grads)
        >>> masks["kernel"].tolist()
        [[0, 1], [1, 0]]
    """

    def calculate_scores(
        self, params: Tree, sparse_state: SparseState | None = None, grads: Tree = None, **kwargs: Any
    ) -> Tree:
        if grads is None:
            raise QmoeError("E_MISSING", "saliency needs gradients")
        return jax.tree.map(lambda param, grad: jnp.abs(param * grad), params, grads)


def random_scores(params: Tree, rng: jax.Array) -> Tree:
    """Uniform in [0, 1), a key per array in the tree's order; in float32 for types of 16 bits, which have so few values
    that most scores would tie and low indices win."""
    leaves, structure = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(rng, num=len(leaves))
    types = [leaf.dtype if jnp.finfo(leaf.dtype).bits >= 32 else jnp.float32 for leaf in leaves]
    drawn = [jax.random.uniform(k, leaf.shape, t) for k, leaf, t in zip(keys, leaves, types, strict=True)]
    return jax.tree_util.tree_unflatten(structure, drawn)


@dataclass
class RandomPruning(BaseUpdater):
    """Random weights go; what went stays away.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import RandomPruning, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> _, masks = RandomPruning(sparsity_distribution_fn=partial(uniform, sparsity=0.5)).instant_sparsify(params)
        >>> int(masks["kernel"].sum())
        2
    """

    def calculate_scores(
        self, params: Tree, sparse_state: SparseState | None = None, grads: Tree = None, **kwargs: Any
    ) -> Tree:
        if sparse_state is None:
            return random_scores(params, self.rng)
        scores = random_scores(params, jax.random.fold_in(self.rng, sparse_state.count))
        return self.apply_masks(scores, sparse_state.masks, is_packed=None)


@dataclass
class _StraightThrough(BaseUpdater):
    """Weights stay dense and learn from the gradients of their pruned selves (Bengio et al., arXiv 1308.3432): the loss
    is to be computed with what `pre_forward_update` returns, and its gradients applied to the dense weights."""

    def pre_forward_update(self, params: Tree, opt_state: SparseState) -> Tree:
        sparsities = self.scheduler.get_sparsity_at_step(opt_state.target_sparsities, opt_state.count)
        scores = self.calculate_scores(params, sparse_state=opt_state)
        return self.apply_masks(params, self.create_masks(scores, sparsities))

    def get_initial_masks(self, params: Tree, target_sparsities: Tree) -> Tree:
        return map_leaves(lambda _: None, params)

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        return sparse_state

    def post_gradient_update(self, params: Tree, sparse_state: SparseState) -> Tree:
        return params


@dataclass
class SteMagnitudePruning(_StraightThrough, MagnitudePruning):
    """Straight-through; in every step the smallest weights are left out.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import OneShotSchedule, SteMagnitudePruning, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = SteMagnitudePruning(OneShotSchedule(0), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.sgd(0.1)).init(params)
        >>> pruner.pre_forward_update(params, state)["kernel"].tolist()
        [[4.0, 0.0], [0.0, 3.0]]
    """


@dataclass
class SteRandomPruning(_StraightThrough, RandomPruning):
    """Straight-through; in every step random weights are left out, others each time.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import OneShotSchedule, SteRandomPruning, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = SteRandomPruning(OneShotSchedule(0), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.sgd(0.1)).init(params)
        >>> int((pruner.pre_forward_update(params, state)["kernel"] != 0).sum())
        2
    """


@dataclass
class _Global(BaseUpdater):
    """One sparsity for all parameters together: the least scores go, wherever they are.

    Attributes:
        sparsity: of all parameters that `filter_fn` (key, parameter) takes.
        use_normalization: scores are divided by their array's L2 norm plus `normalization_eps`.
        custom_sparsity_map: key, or "a/kernel" -> sparsity of its own, by the same scores.
    """

    custom_sparsity_map: Mapping[Any, float] | None = None
    filter_fn: FilterFn = not_dim_one
    normalization_eps: float = 1e-8
    use_normalization: bool = True
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity)
        if not isinstance(self.sparsity_type, Unstructured):
            raise QmoeError("E_UNKNOWN", "global pruning is unstructured", actual=self.sparsity_type)

    def init_state(self, params: Tree) -> SparseState:
        custom = custom_sparsities(self.custom_sparsity_map)
        leaves, structure = keyed_leaves(params)
        masks = [
            jnp.ones(leaf.shape, MASK_DTYPE) if key in custom or self.filter_fn(key, leaf) else None
            for key, leaf in leaves
        ]
        return SparseState(
            masks=self._stored(jax.tree_util.tree_unflatten(structure, masks)),
            target_sparsities=jnp.asarray(self.sparsity, jnp.float32),
            count=jnp.zeros([], jnp.int32),
        )

    def instant_sparsify(self, params: Tree, grads: Tree = None, **kwargs: Any) -> tuple[Tree, Tree]:
        masks = self.create_masks(self.calculate_scores(params, grads=grads, **kwargs), self.sparsity)
        return self.apply_masks(params, masks), self._stored(masks)

    def create_masks(self, scores: Tree, sparsities: Any) -> Tree:
        topk = self.topk_fn
        assert topk is not None
        custom = custom_sparsities(self.custom_sparsity_map)
        leaves, structure = keyed_leaves(scores)
        masks: dict[Key, Any] = {key: topk(leaf, custom[key]) for key, leaf in leaves if key in custom}
        ranked = sorted(
            ((key, leaf) for key, leaf in leaves if key not in custom and self.filter_fn(key, leaf)),
            key=lambda pair: pair[0],
        )
        if ranked:
            kept = topk(jnp.concatenate([self._normalized(leaf).reshape(-1) for _, leaf in ranked]), sparsities)
            begin = 0
            for key, leaf in ranked:
                masks[key] = kept[begin : begin + leaf.size].reshape(leaf.shape)
                begin += leaf.size
        return jax.tree_util.tree_unflatten(structure, [masks.get(key) for key, _ in leaves])

    def _normalized(self, score: jax.Array) -> jax.Array:
        return score / (jnp.linalg.norm(score) + self.normalization_eps) if self.use_normalization else score


@dataclass
class GlobalMagnitudePruning(_Global, MagnitudePruning):
    """The smallest weights of all parameters together go.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import GlobalMagnitudePruning
        >>> params = {"a": jnp.array([[4.0, 3.0]]), "b": jnp.array([[0.1, 0.2]])}
        >>> pruner = GlobalMagnitudePruning(sparsity=0.5, use_normalization=False)
        >>> pruner.instant_sparsify(params)[1]
        {'a': Array([[1, 1]], dtype=uint8), 'b': Array([[0, 0]], dtype=uint8)}
    """


@dataclass
class GlobalSaliencyPruning(_Global, SaliencyPruning):
    """The weights of least |weight x gradient| of all parameters together go.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import GlobalSaliencyPruning
        >>> params = {"a": jnp.array([[4.0, 3.0]]), "b": jnp.array([[0.1, 0.2]])}
        >>> grads = {"a": jnp.zeros((1, 2)), "b": jnp.ones((1, 2))}
        >>> pruner = GlobalSaliencyPruning(sparsity=0.5, use_normalization=False)
        >>> pruner.instant_sparsify(params, grads)[1]
        {'a': Array([[0, 0]], dtype=uint8), 'b': Array([[1, 1]], dtype=uint8)}
    """
