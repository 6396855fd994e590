"""Masks in npz files, as `qmoe_core.sparsify.Masks` reads and writes them for PyTorch.

    <name>           bool, (N, K) = (outputs, inputs), or (E, N, K) for a stack of experts
    __qmoe_masks__   JSON: name -> [pattern, whether the parameter of that name is (K, N)]

flax's kernels are (inputs, outputs), so their masks are turned around on the way. Nothing in a file is executed.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import QmoeError
from ..store import write_atomic
from .distributions import FilterFn, kernels_only
from .masks import MASK_DTYPE
from .trees import Key, Tree, keyed_leaves, map_keyed
from .types import Block, NByM, SparsityType

_KINDS = "__qmoe_masks__"


def _name(key: Key) -> str:
    return "/".join(key)


def save_masks(
    path: str | os.PathLike[str],
    masks: Tree,
    sparsity_type: SparsityType | None = None,
    *,
    name_fn: Callable[[Key], str] = _name,
    is_kernel: FilterFn = kernels_only,
    transposed: Collection[str] | None = None,
) -> None:
    """Writes masks (not packed) that are not None, whole or not at all.

    Args:
        sparsity_type: what they were made for, noted beside masks that it says the same of in PyTorch.
        name_fn: key of a parameter -> name in the file, e.g. that of the PyTorch parameter.
        is_kernel: (key, mask) -> whether the parameter is (..., inputs, outputs): what is called kernel.
        transposed: names whose parameters, for whoever reads the file, are (..., inputs, outputs). Without it, kernels
            with the default names, which are JAX's own; none with others.

    Raises:
        QmoeError: `E_SHAPE` unless masks have 2 or 3 dimensions; `E_NAME` for two masks of one name; `E_NO_SPACE`,
            `E_IO`.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from qmoe_core.jax import load_masks, save_masks
        >>> path = tempfile.mkdtemp() + "/masks.npz"
        >>> save_masks(path, {"dense": {"kernel": jnp.eye(3), "bias": None}})
        >>> print(load_masks(path, {"dense": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}})["dense"]["kernel"][0])
        [1 0 0]
    """
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, list[Any]] = {}
    for key, leaf in keyed_leaves(masks)[0]:
        if leaf is None:
            continue
        name, mask = name_fn(key), np.asarray(leaf).astype(np.bool_)
        if mask.ndim not in (2, 3):
            raise QmoeError("E_SHAPE", "masks in files are of matrices and stacks of them", tensor=name,
                            actual=mask.shape)  # fmt: skip
        if name in arrays or name == _KINDS:
            raise QmoeError("E_NAME", "two masks of one name", tensor=name)
        kernel = is_kernel(key, leaf)
        flipped = kernel and name_fn is _name if transposed is None else name in transposed
        kinds[name] = [_pattern(sparsity_type, mask.ndim, kernel), flipped]
        arrays[name] = np.ascontiguousarray(mask.swapaxes(-1, -2)) if kernel else mask
    arrays[_KINDS] = np.array(json.dumps(kinds))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(Path(path), buffer.getvalue())


def _pattern(kind: SparsityType | None, ndim: int, kernel: bool) -> str:
    """`qmoe_core.sparsify.Pattern`'s text for a type, where it says the same of the mask in the file."""
    if isinstance(kind, NByM) and kind.n < kind.m and kind.axis % ndim == ndim - (2 if kernel else 1):
        return f"{kind.n}:{kind.m}"
    if isinstance(kind, Block) and ndim == 2:
        rows, columns = kind.block_shape[::-1] if kernel else kind.block_shape
        return f"block:{rows}x{columns}" + ("" if kind.use_avg_pooling else ":max")
    return "unstructured"


def load_masks(
    path: str | os.PathLike[str],
    params: Tree,
    *,
    name_fn: Callable[[Key], str] = _name,
    is_kernel: FilterFn = kernels_only,
) -> Tree:
    """Masks for a tree of parameters, uint8 in their shapes; None where the file has none.

    Args:
        name_fn, is_kernel: as in `save_masks`.

    Raises:
        QmoeError: `E_MISSING` (no file; a mask of no parameter), `E_CORRUPT`, `E_DTYPE`, `E_SHAPE`, `E_VALUE` (neither
            0 nor 1).
    """
    if not Path(path).exists():
        raise QmoeError("E_MISSING", "no such file", file=path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name != _KINDS}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise QmoeError("E_CORRUPT", f"this is no npz file of masks: {error}", file=path) from error
    used = set()

    def of(key: Key, param: Any) -> Any:
        name = name_fn(key)
        if param is None or name not in arrays:
            return None
        used.add(name)
        mask = _checked(arrays[name], name)
        if is_kernel(key, param) and mask.ndim > 1:
            mask = mask.swapaxes(-1, -2)
        if mask.shape != tuple(param.shape):
            raise QmoeError("E_SHAPE", "a mask for another shape", file=path, tensor=name, expected=tuple(param.shape),
                            actual=mask.shape)  # fmt: skip
        return jnp.asarray(mask, MASK_DTYPE)

    try:
        masks = map_keyed(of, params)
    except QmoeError as error:
        raise error.locate(file=path) from None
    if set(arrays) - used:
        raise QmoeError("E_MISSING", "a mask of no parameter", file=path, tensor=min(set(arrays) - used))
    return masks


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.integer):
        raise QmoeError("E_DTYPE", "masks are bool or integers", tensor=name, actual=str(array.dtype))
    if not np.isin(array, (0, 1)).all():
        raise QmoeError("E_VALUE", "a mask holds 0 and 1", tensor=name)
    return array
