"""How sparsity is spread over parameters: trees of sparsities, None where a parameter stays dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, prod
from typing import Any

from ..errors import QmoeError
from .trees import Key, Tree, keyed_leaves, map_keyed

FilterFn = Callable[[Key, Any], bool]


def not_dim_one(key: Key, param: Any) -> bool:
    """Everything but biases and scales: what has more than one dimension. The default."""
    return len(param.shape) > 1


def kernels_only(key: Key, param: Any) -> bool:
    """What flax calls a kernel."""
    return bool(key) and key[-1] == "kernel"


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """Raises `E_VALUE` unless 0 <= sparsity <= 1."""
    if not 0 <= sparsity <= 1:
        raise QmoeError("E_VALUE", f"{what} is between 0 and 1", actual=sparsity)
    return float(sparsity)


def as_key(name: str | Sequence[str]) -> Key:
    """("a", "kernel") from itself or from "a/kernel"."""
    return tuple(name.split("/")) if isinstance(name, str) else tuple(map(str, name))


def custom_sparsities(given: Mapping[Any, float] | None) -> dict[Key, float]:
    """Checked sparsities by key."""
    return {as_key(name): check_sparsity(value, f"the sparsity of {name}") for name, value in (given or {}).items()}


def uniform(
    params: Tree,
    sparsity: float,
    filter_fn: FilterFn = not_dim_one,
    custom_sparsity_map: Mapping[Any, float] | None = None,
) -> Tree:
    """The same sparsity everywhere.

    Args:
        params: a tree of arrays, or one array.
        filter_fn: (key, parameter) -> whether it is pruned. `custom_sparsity_map`: key, or "a/kernel" -> sparsity,
            which goes before all else.

    Raises:
        QmoeError: `E_VALUE`; `E_MISSING` for a custom sparsity of no parameter.
    """
    check_sparsity(sparsity)
    custom = custom_sparsities(custom_sparsity_map)
    _all_known(custom, params)

    def of(key: Key, param: Any) -> float | None:
        if param is None:
            return None
        return custom[key] if key in custom else sparsity if filter_fn(key, param) else None

    return map_keyed(of, params)


def erk(
    params: Tree,
    sparsity: float,
    filter_fn: FilterFn = not_dim_one,
    custom_sparsity_map: Mapping[Any, float] | None = None,
) -> Tree:
    """Erdos-Renyi kernel (Evci et al., arXiv 1911.11134): the share that is kept is proportional to the sum of an
    array's sides over their product. Arrays that would keep more than everything stay dense, and the others make up.

    Arguments and errors are those of `uniform`; parameters with a custom sparsity do not count.

    Example:
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import erk
        >>> erk({"wide": jnp.ones((64, 64)), "narrow": jnp.ones((64, 8)), "bias": jnp.ones(8)}, 0.5)
        {'bias': None, 'narrow': 0.0, 'wide': 0.5625}
    """
    check_sparsity(sparsity)
    custom = custom_sparsities(custom_sparsity_map)
    _all_known(custom, params)
    leaves, _ = keyed_leaves(params)
    shapes = {
        key: tuple(map(int, leaf.shape))
        for key, leaf in leaves
        if leaf is not None and key not in custom and filter_fn(key, leaf)
    }
    found = _erdos_renyi(shapes, sparsity) | custom
    return map_keyed(lambda key, _: found.get(key), params)


def _erdos_renyi(shapes: Mapping[Key, tuple[int, ...]], sparsity: float) -> dict[Key, float]:
    zeros = {key: floor(sparsity * prod(shape)) for key, shape in shapes.items()}
    ratio = {key: sum(shape) / prod(shape) for key, shape in shapes.items()}
    dense: set[Key] = set()
    while len(dense) < len(shapes):
        others = [key for key in shapes if key not in dense]
        kept = sum(prod(shapes[key]) - zeros[key] for key in others) - sum(zeros[key] for key in dense)
        scale = kept / sum(ratio[key] * prod(shapes[key]) for key in others)
        largest = max(ratio[key] for key in others)
        if scale * largest <= 1:
            # Where dense arrays alone keep too much, `scale` is negative; then nothing else can be kept.
            return {key: 0.0 if key in dense else min(1.0, 1.0 - scale * ratio[key]) for key in shapes}
        dense |= {key for key in others if ratio[key] == largest}
    return dict.fromkeys(shapes, 0.0)


def _all_known(custom: Mapping[Key, float], params: Tree) -> None:
    unknown = set(custom) - {key for key, _ in keyed_leaves(params)[0]}
    if unknown:
        raise QmoeError("E_MISSING", "a custom sparsity of no parameter", tensor="/".join(min(unknown)))
