"""The base of all algorithms: when masks change, from which scores, and how that goes with an optax optimizer.

After JaxPruner (Lee et al., arXiv 2304.14082), whose names, arguments and hooks these are; docs/jax.md lists what
differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..errors import QmoeError
from .distributions import uniform
from .masks import MASK_DTYPE, TopKFn, apply_mask, get_topk_fn, pack_masks, unpack_masks
from .schedules import NoUpdateSchedule
from .state import SparseState
from .trees import Tree, map_leaves
from .types import SparsityType, Unstructured

DistributionFn = Callable[[Tree], Tree]


@dataclass
class BaseUpdater:
    """Prunes parameters while an optax optimizer trains them. Subclasses give scores.

    Attributes:
        scheduler: when masks change and how sparse they are then; see `PolynomialSchedule`.
        skip_gradients: in steps that change masks, the optimizer does nothing.
        is_sparse_gradients: gradients of pruned weights are zero.
        sparsity_type: which weights go together; `topk_fn` (scores, sparsity) -> mask replaces what it implies.
        sparsity_distribution_fn: parameters -> tree of sparsities, None for what stays dense; `uniform` and `erk` with
            their other arguments filled in.
        rng_seed: a key of `jax.random`, or a number; for random scores.
        use_packed_masks: keep eight weights of a mask per byte.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, optax
        >>> from qmoe_core.jax import MagnitudePruning, OneShotSchedule, uniform
        >>> pruner = MagnitudePruning(OneShotSchedule(1), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> optimizer = pruner.wrap_optax(optax.sgd(0.1))
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.tree.map(jnp.ones_like, params)
        ...     updates, state = optimizer.update(grads, state, params)
        ...     return pruner.post_gradient_update(optax.apply_updates(params, updates), state), state
        >>> for _ in range(2):
        ...     params, state = step(params, state)
        >>> print(state.masks["kernel"].tolist(), float(params["kernel"][0, 1]))
        [[1, 0], [0, 1]] 0.0
    """

    scheduler: Any = field(default_factory=NoUpdateSchedule)
    skip_gradients: bool = False
    is_sparse_gradients: bool = False
    sparsity_type: SparsityType = field(default_factory=Unstructured)
    sparsity_distribution_fn: DistributionFn | None = field(default_factory=lambda: partial(uniform, sparsity=0.0))
    rng_seed: Any = None
    use_packed_masks: bool = False
    topk_fn: TopKFn | None = None

    def __post_init__(self) -> None:
        if self.topk_fn is None:
            self.topk_fn = get_topk_fn(self.sparsity_type)

    @property
    def rng(self) -> jax.Array:
        """The key that random scores come from. Made when it is used: importing must not start a device."""
        if self.rng_seed is None or isinstance(self.rng_seed, int):
            return jax.random.PRNGKey(8 if self.rng_seed is None else self.rng_seed)
        return self.rng_seed

    # What subclasses change

    def calculate_scores(
        self, params: Tree, sparse_state: SparseState | None = None, grads: Tree = None, **kwargs: Any
    ) -> Tree:
        """What every weight is worth, as a tree like the parameters. `kwargs` come from `update` and
        `instant_sparsify`."""
        raise NotImplementedError

    def get_initial_masks(self, params: Tree, target_sparsities: Tree) -> Tree:
        """Masks before the first step: ones, or None where a parameter is never pruned."""
        return map_leaves(
            lambda param, target: None if target is None else jnp.ones(param.shape, MASK_DTYPE),
            params,
            target_sparsities,
        )

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        """The state with masks for this step. Called under a condition in steps that change masks."""
        sparsities = self.scheduler.get_sparsity_at_step(sparse_state.target_sparsities, sparse_state.count)
        scores = self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)
        return sparse_state._replace(masks=self._stored(self.create_masks(scores, sparsities)))

    def settle(self, old: SparseState, new: SparseState, params: Tree) -> SparseState:
        """The new state with what follows from its masks for the optimizer's state. Called in every step, with the
        same masks in both states in most: outside of a condition XLA makes it part of the optimizer's own loop over
        its moments, where a condition would copy them."""
        return new

    def pre_forward_update(self, params: Tree, opt_state: SparseState) -> Tree:
        """To be called on the parameters before they are used. Nothing, but for straight-through estimators."""
        return params

    def post_gradient_update(self, params: Tree, sparse_state: SparseState) -> Tree:
        """To be called on the parameters after every step: sets pruned weights to zero."""
        return self.apply_masks(params, sparse_state.masks, is_packed=None)

    # What they build on

    def create_masks(self, scores: Tree, sparsities: Tree) -> Tree:
        """Masks (not packed) of scores, None where the sparsity is None."""
        topk = self.topk_fn
        assert topk is not None
        return map_leaves(lambda score, s: None if s is None else topk(score, s), scores, sparsities)

    def apply_masks(self, params: Tree, masks: Tree, is_packed: bool | None = False) -> Tree:
        """Parameters with zeros where masks have zeros. `is_packed` None: as `use_packed_masks` says."""
        packed = self.use_packed_masks if is_packed is None else is_packed
        return map_leaves(partial(apply_mask, is_packed=packed), params, masks)

    def unpacked_masks(self, sparse_state: SparseState, params: Tree) -> Tree:
        """The state's masks in the shapes of the parameters, packed or not."""
        return unpack_masks(sparse_state.masks, params) if self.use_packed_masks else sparse_state.masks

    def _stored(self, masks: Tree) -> Tree:
        return pack_masks(masks) if self.use_packed_masks else masks

    # How they are used

    def init_state(self, params: Tree) -> SparseState:
        """The state before the first step, without the optimizer's."""
        targets = None if self.sparsity_distribution_fn is None else self.sparsity_distribution_fn(params)
        masks = self.get_initial_masks(params, targets)
        return SparseState(
            masks=self._stored(masks),
            target_sparsities=map_leaves(lambda s: None if s is None else jnp.asarray(s, jnp.float32), targets),
            count=jnp.zeros([], jnp.int32),
        )

    def instant_sparsify(self, params: Tree, grads: Tree = None, **kwargs: Any) -> tuple[Tree, Tree]:
        """Prunes once, without training.

        Returns:
            Pruned parameters, and masks (packed with `use_packed_masks`).

        Raises:
            QmoeError: `E_MISSING` without a distribution, or what scores need.
        """
        if self.sparsity_distribution_fn is None:
            raise QmoeError("E_MISSING", "pruning needs sparsity_distribution_fn")
        sparsities = self.sparsity_distribution_fn(params)
        masks = self.create_masks(self.calculate_scores(params, grads=grads, **kwargs), sparsities)
        return self.apply_masks(params, masks), self._stored(masks)

    def wrap_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The optimizer with a `SparseState` around its own state, whose masks change by the schedule.

        Call `post_gradient_update` after `optax.apply_updates`, and `pre_forward_update` before the loss. Further
        arguments of `update` reach scores, and the optimizer if it takes any. Works under jit, scan and sharding.
        """
        wrapped = optax.with_extra_args_support(inner)

        def init(params: Tree) -> SparseState:
            return self.init_state(params)._replace(inner_state=inner.init(params))

        def update(updates: Tree, state: SparseState, params: Tree = None, **extra: Any) -> tuple[Tree, SparseState]:
            if params is None:
                raise QmoeError("E_MISSING", "sparse training needs the parameters: update(updates, state, params)")
            due = self.scheduler.is_mask_update_iter(state.count)
            changed = _changed_if(due, partial(self.update_state, **extra), state, params, updates)
            state = changed if changed is state else self.settle(state, changed, params)
            if self.is_sparse_gradients:
                updates = self.apply_masks(updates, state.masks, is_packed=None)
            new_updates, inner_state = wrapped.update(updates, state.inner_state, params, **extra)
            if self.skip_gradients:
                new_updates = jax.tree.map(lambda leaf: jnp.where(due, jnp.zeros_like(leaf), leaf), new_updates)
                inner_state = jax.tree.map(partial(jnp.where, due), state.inner_state, inner_state)
            count = jnp.where(state.count < jnp.iinfo(jnp.int32).max, state.count + 1, state.count)
            return new_updates, state._replace(inner_state=inner_state, count=count)

        return optax.GradientTransformationExtraArgs(init, update)


def _changed_if(due: Any, change: Callable[..., SparseState], state: SparseState, params: Tree, grads: Tree) -> Any:
    """`change(state, params, grads)` if due, else the state. Only what it changes passes through the condition: XLA
    copies whatever does, and an optimizer's moments are twice the parameters."""
    if not isinstance(due, jax.core.Tracer):
        return change(state, params, grads) if due else state
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten(state)
    changed: list[int] = []

    def new_leaves() -> list[Any]:
        new, new_structure = jax.tree_util.tree_flatten(change(state, params, grads))
        if new_structure != structure:
            raise QmoeError("E_SHAPE", "update_state returned another structure", expected=structure,
                            actual=new_structure)  # fmt: skip
        changed[:] = [i for i, leaf in enumerate(new) if leaf is not leaves[i]]
        return [jnp.asarray(new[i], leaves[i].dtype) for i in changed]

    jax.eval_shape(new_leaves)  # finds out what changes
    if not changed:
        return state
    kept = [leaves[i] for i in changed]
    for i, leaf in zip(changed, jax.lax.cond(due, new_leaves, lambda: kept), strict=True):
        leaves[i] = leaf
    return jax.tree_util.tree_unflatten(structure, leaves)


@dataclass
class NoPruning(BaseUpdater):
    """Everything stays dense.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import NoPruning
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> NoPruning().wrap_optax(optax.sgd(0.1)).init(params).masks
        {'kernel': None}
    """

    sparsity_distribution_fn: DistributionFn | None = None

    def get_initial_masks(self, params: Tree, target_sparsities: Tree) -> Tree:
        return map_leaves(lambda _: None, params)

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        return sparse_state

    def instant_sparsify(self, params: Tree, grads: Tree = None, **kwargs: Any) -> tuple[Tree, Tree]:
        return params, self.get_initial_masks(params, None)
