"""Masks between JAX and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_core import QmoeError

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import qmoe_core.jax as qjax  # noqa: E402


def parameters() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "dense": {"kernel": (8, 12), "bias": (12,)},  # inputs, outputs
        "experts": {"kernel": (3, 8, 4)},
        "embedding": {"table": (8, 16)},  # as in PyTorch
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def pruned(kind: qjax.SparsityType, sparsity: float = 0.5) -> Any:
    topk = qjax.get_topk_fn(kind)
    return jax.tree.map(lambda p: topk(jnp.abs(p), sparsity) if p.ndim > 1 else None, parameters())


def equal(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(bool((a == b).all()) for a, b in pairs)


def test_masks_come_back(tmp_path: Path) -> None:
    masks = pruned(qjax.Unstructured(), 0.7)
    qjax.save_masks(tmp_path / "masks.npz", masks)
    found = qjax.load_masks(tmp_path / "masks.npz", parameters())
    assert equal(masks, found) and found["dense"]["bias"] is None
    assert all(mask.dtype == jnp.uint8 for mask in jax.tree.leaves(found))
    without = masks | {"experts": {"kernel": None}}
    qjax.save_masks(tmp_path / "masks.npz", without)
    assert qjax.load_masks(tmp_path / "masks.npz", parameters())["experts"]["kernel"] is None


def test_pytorch_reads_masks_of_jax(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from qmoe_core.sparsify import Masks

    kind = qjax.NByM(2, 4, axis=-2)  # along the inputs of kernels
    masks, params = pruned(kind), parameters()
    names = {"dense/kernel": "layer.weight", "experts/kernel": "experts.up", "embedding/table": "table"}
    qjax.save_masks(
        tmp_path / "masks.npz", masks, kind, name_fn=lambda key: names["/".join(key)], transposed=["experts.up"]
    )
    found = Masks.from_npz(tmp_path / "masks.npz")
    assert {name: str(pattern) for name, pattern in found.patterns.items()} == {
        "layer.weight": "2:4", "experts.up": "2:4", "table": "unstructured",
    }  # fmt: skip
    found.check()
    state = {
        "layer.weight": torch.tensor(np.asarray(params["dense"]["kernel"]).T.copy()),  # (outputs, inputs)
        "experts.up": torch.tensor(np.asarray(params["experts"]["kernel"])),  # (E, inputs, outputs), as in gpt-oss
        "table": torch.tensor(np.asarray(params["embedding"]["table"])),
    }
    found.apply(state)
    masked = jax.tree.map(qjax.apply_mask, params, masks, is_leaf=lambda leaf: leaf is None)
    np.testing.assert_array_equal(state["layer.weight"].numpy().T, masked["dense"]["kernel"])
    np.testing.assert_array_equal(state["experts.up"].numpy(), masked["experts"]["kernel"])
    np.testing.assert_array_equal(state["table"].numpy(), masked["embedding"]["table"])


def test_jax_reads_masks_of_pytorch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from qmoe_core.sparsify import Masks, Pattern

    pattern = Pattern.parse("2:4")
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    stack = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    masks = Masks({"layer.weight": pattern.select(weight.abs()), "up": pattern.select(stack.abs())}, pattern)
    masks.to_npz(tmp_path / "masks.npz")
    names = {("dense", "kernel"): "layer.weight", ("experts", "kernel"): "up"}
    found = qjax.load_masks(tmp_path / "masks.npz", parameters(), name_fn=lambda key: names.get(key, "-"))
    np.testing.assert_array_equal(found["dense"]["kernel"], masks["layer.weight"].numpy().T)
    np.testing.assert_array_equal(found["experts"]["kernel"], masks["up"].numpy().swapaxes(1, 2))
    # Without ties both libraries choose the same.
    kernel = jnp.asarray(weight.abs().numpy().T)
    np.testing.assert_array_equal(found["dense"]["kernel"], qjax.get_topk_fn(qjax.NByM(2, 4, -2))(kernel, 0.5))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (qjax.NByM(2, 4, -2), {"dense/kernel": "2:4", "experts/kernel": "2:4", "embedding/table": "unstructured"}),
        (qjax.NByM(2, 4), {"dense/kernel": "unstructured", "embedding/table": "2:4"}),
        (qjax.Block((4, 2)), {"dense/kernel": "block:2x4", "embedding/table": "block:4x2"}),
        (qjax.Block((2, 2), False), {"dense/kernel": "block:2x2:max", "experts/kernel": "unstructured"}),
        (qjax.Channel(0), {"dense/kernel": "unstructured"}),
    ],
)
def test_patterns_are_noted_where_pytorch_says_the_same(
    tmp_path: Path, kind: qjax.SparsityType, expected: dict[str, str]
) -> None:
    pytest.importorskip("torch")
    from qmoe_core.sparsify import Masks

    qjax.save_masks(tmp_path / "masks.npz", pruned(kind), kind)
    found = Masks.from_npz(tmp_path / "masks.npz")
    assert expected.items() <= {name: str(pattern) for name, pattern in found.patterns.items()}.items()
    assert found.transposed == {"dense/kernel", "experts/kernel"}
    found.check()


def test_what_is_no_file_of_masks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(QmoeError, match="E_MISSING"):
        qjax.load_masks(path, params)
    for array, code in (
        (np.ones((3, 2), np.float32), "E_DTYPE"),
        (np.full((3, 2), 2), "E_VALUE"),
        (np.ones((2, 3), bool), "E_SHAPE"),
    ):
        np.savez(path, **{"a/kernel": array})  # type: ignore[arg-type]
        with pytest.raises(QmoeError, match=code) as caught:
            qjax.load_masks(path, params)
        assert caught.value.tensor == "a/kernel" and caught.value.file == str(path)
    np.savez(path, **{"b/kernel": np.ones((3, 2), bool)})  # type: ignore[arg-type]
    with pytest.raises(QmoeError, match="E_MISSING"):
        qjax.load_masks(path, params)
    np.savez(path, **{"a/kernel": np.array([{}], object)})  # type: ignore[arg-type]
    with pytest.raises(QmoeError, match="E_CORRUPT"):  # a pickle, which is not opened
        qjax.load_masks(path, params)
    path.write_bytes(b"PK\x03\x04 not")
    with pytest.raises(QmoeError, match="E_CORRUPT"):
        qjax.load_masks(path, params)


def test_masks_that_do_not_fit_into_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    with pytest.raises(QmoeError, match="E_SHAPE"):
        qjax.save_masks(path, {"kernel": jnp.ones((3, 3, 2, 2))})
    with pytest.raises(QmoeError, match="E_NAME"):
        qjax.save_masks(path, {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, name_fn=lambda key: "same")
    assert not path.exists()
