"""What sparse training keeps beside the parameters, and the parts of an optimizer's state that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from .trees import Key, Tree, key_of, keyed_leaves


class SparseState(NamedTuple):
    """The state of a wrapped optimizer: arrays and None only, so it goes through jit, scan, sharding and checkpoints.

    Attributes:
        masks: a tree like the parameters, of uint8 masks, packed where the updater says so, or None.
        inner_state: of the optimizer that was wrapped.
        target_sparsities: a tree like the parameters, of float32 scalars or None; with global pruning one scalar.
        count: steps taken, int32.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import MagnitudePruning, SparseState
        >>> state = MagnitudePruning().wrap_optax(optax.sgd(0.1)).init({"kernel": jnp.ones((2, 2))})
        >>> isinstance(state, SparseState), int(state.count)
        (True, 0)
    """

    masks: Tree
    inner_state: Any = None
    target_sparsities: Tree = None
    count: Any = None


def map_param_like(
    function: Callable[[Key, jax.Array], jax.Array], inner_state: Any, params: Tree, *, any_shape: bool = False
) -> Any:
    """The optimizer's state with function(key of the parameter, array) for every array that belongs to a parameter.

    Momenta and the like are kept in trees like that of the parameters, so the path to such an array ends with the
    parameter's own; that holds within chains, masks, `multi_transform`, `inject_hyperparams` and custom optimizers,
    whatever the types of their states are.

    Args:
        any_shape: arrays of other shapes, too, such as AdaFactor's row and column statistics.
    """
    shapes = {key: tuple(leaf.shape) for key, leaf in keyed_leaves(params)[0] if leaf is not None}
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner_state)
    new = []
    for path, leaf in leaves:
        words = key_of(path)
        ends = (words[start:] for start in range(len(words) + 1))  # the longest end that is a parameter's key
        key = next((end for end in ends if end in shapes), None)
        belongs = key is not None and hasattr(leaf, "shape") and (any_shape or tuple(leaf.shape) == shapes[key])
        new.append(function(key, leaf) if belongs and key is not None else leaf)
    return jax.tree_util.tree_unflatten(structure, new)


def find_states(inner_state: Any, kind: type) -> list[Any]:
    """All states of a type, e.g. `optax.ScaleByAdamState`, wherever they are in an optimizer's state."""
    leaves = jax.tree_util.tree_leaves(inner_state, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
