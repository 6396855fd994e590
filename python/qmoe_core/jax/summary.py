"""How sparse trees are, and how much two trees of masks have in common. Names and keys are those of JaxPruner."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .trees import Tree, keyed_leaves


def summarize_sparsity(param_tree: Tree, only_total_sparsity: bool = False) -> dict[str, jax.Array]:
    """Shares of zeros, by name ("a/kernel") and in all (`_total_sparsity`), and how many parameters there are
    (`_nparams`) and are not zero (`_nparams_nnz`). float32, as counts of large models do not fit int32."""
    leaves = [("/".join(key), jnp.asarray(leaf)) for key, leaf in keyed_leaves(param_tree)[0] if leaf is not None]
    nonzero = [jnp.count_nonzero(leaf).astype(jnp.float32) for _, leaf in leaves]
    kept, size = sum(nonzero, jnp.float32(0)), sum(leaf.size for _, leaf in leaves)
    summary = {}
    if not only_total_sparsity:
        summary = {name: 1 - count / leaf.size for (name, leaf), count in zip(leaves, nonzero, strict=True)}
    total = 1 - kept / max(size, 1)
    return summary | {"_total_sparsity": total, "_nparams_nnz": kept, "_nparams": jnp.float32(size)}


def summarize_intersection(
    mask_tree1: Tree, mask_tree2: Tree, only_total_intersection: bool = False
) -> dict[str, jax.Array]:
    """Which share of what the first masks keep the second ones keep too, by name and in all (`_total_intersection`);
    0 where the first keep nothing. Masks are not packed; None keeps nothing."""
    first, second = keyed_leaves(mask_tree1)[0], keyed_leaves(mask_tree2)[0]
    summary, common, kept = {}, jnp.float32(0), jnp.float32(0)
    for (key, a), (_, b) in zip(first, second, strict=True):
        both, ones = (jnp.float32(0),) * 2 if a is None else (_count(a), _count(a))
        if a is not None:
            both = jnp.float32(0) if b is None else jnp.sum((a == 1) & (b == 1)).astype(jnp.float32)
        summary["/".join(key)] = both / jnp.maximum(ones, 1)
        common, kept = common + both, kept + ones
    total = {"_total_intersection": common / jnp.maximum(kept, 1)}
    return total if only_total_intersection else summary | total


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask == 1).astype(jnp.float32)
