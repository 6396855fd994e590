"""Trees whose leaves have names. A leaf's key is the tuple of what leads to it: ("layer_0", "attention", "kernel")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Key = tuple[str, ...]
Tree = Any


def is_none(leaf: Any) -> bool:
    return leaf is None


def map_leaves(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map`, for which None is a leaf in every one of the trees."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_none)


def _word(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def key_of(path: Any) -> Key:
    return tuple(_word(entry) for entry in path)


def keyed_leaves(tree: Tree) -> tuple[list[tuple[Key, Any]], Any]:
    """Keys and leaves in the tree's order, and its structure. None counts as a leaf."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [(key_of(path), leaf) for path, leaf in leaves], structure


def map_keyed(function: Callable[[Key, Any], Any], tree: Tree) -> Tree:
    """The tree with function(key, leaf) for every leaf."""
    leaves, structure = keyed_leaves(tree)
    return jax.tree_util.tree_unflatten(structure, [function(key, leaf) for key, leaf in leaves])


def by_key(tree: Tree) -> dict[Key, Any]:
    """Leaves by key."""
    return dict(keyed_leaves(tree)[0])
