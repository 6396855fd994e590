"""qmoe_core.jax around optimizers of all kinds: jit, scan, sharding, packed masks, moments of what has grown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_core import QmoeError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax_fixtures import OPTIMIZERS, STEPS, equal, parameters, train, updater  # noqa: E402

import qmoe_core.jax as qjax  # noqa: E402

TRAINING = [name for name in qjax.all_algorithm_names() if name != "wanda"]


@pytest.mark.parametrize("algorithm", TRAINING)
def test_every_algorithm_is_the_same_with_and_without_jit_and_packing(algorithm: str) -> None:
    history, params, state = train(updater(algorithm))
    packed, packed_params, packed_state = train(updater(algorithm, **packing(algorithm)))
    eager, _, eager_state = train(updater(algorithm), jit=False)
    for step in range(STEPS):
        assert equal(history[step], packed[step]) and equal(history[step], eager[step]), step
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(packed_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(state.count) == int(packed_state.count) == int(eager_state.count) == STEPS
    masks = [leaf for leaf in jax.tree.leaves(packed_state.masks)]
    if algorithm not in ("no_prune", "magnitude_ste", "random_ste"):
        assert sorted(mask.size for mask in masks) == [24, 48]  # 24 x 8 and 16 x 24 weights, biases have none
        kept = int(history[-1]["dense"]["kernel"].sum()) + int(history[-1]["out"]["kernel"].sum())
        assert kept == pytest.approx((0.5 if algorithm == "iterative_nm" else 0.3) * 576, abs=1)
        zeros = int((params["dense"]["kernel"] == 0).sum()) + int((params["out"]["kernel"] == 0).sum())
        assert zeros >= 576 - kept
    else:
        assert masks == []


def packing(algorithm: str) -> dict[str, bool]:
    return {} if algorithm == "no_prune" else {"use_packed_masks": True}


@pytest.mark.parametrize("packed", [False, True])
def test_sparse_gradients_are_masked_as_the_state_says(packed: bool) -> None:
    """JaxPruner multiplies gradients with masks that are still packed."""
    pruner = updater("magnitude", is_sparse_gradients=True, use_packed_masks=packed)
    wrapped = pruner.wrap_optax(optax.sgd(1.0))
    params = parameters()
    state = wrapped.init(params)
    for step in range(4):
        updates, state = jax.jit(wrapped.update)(parameters(step + 1), state, params)
    mask = pruner.unpacked_masks(state, params)["dense"]["kernel"]
    assert 0 < int(mask.sum()) < mask.size
    np.testing.assert_array_equal(np.asarray(updates["dense"]["kernel"]) != 0, np.asarray(mask) == 1)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("algorithm", ["rigl", "set", "magnitude"])
def test_any_optimizer_can_be_wrapped(algorithm: str, optimizer: str) -> None:
    """JaxPruner's RigL and SET refuse states that they do not know, or change their types, which jit refuses."""
    history, _, state = train(updater(algorithm), OPTIMIZERS[optimizer]())
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(OPTIMIZERS[optimizer]().init(parameters()))
    kept = [int(masks["dense"]["kernel"].sum()) for masks in history]
    if algorithm == "magnitude":
        assert kept == sorted(kept, reverse=True) and kept[0] == 384 and kept[-1] == 115
    else:
        assert set(kept) == {115} and not equal(history[0], history[-1])


def test_grown_weights_begin_without_a_past() -> None:
    """Momenta are zeroed for what has grown, and only for that, wherever the optimizer keeps them."""
    for make in (OPTIMIZERS["masked"], OPTIMIZERS["injected"], OPTIMIZERS["adamw, clipped"]):
        pruner = updater("rigl", drop_fraction=0.5)
        params, grads = parameters(), parameters(5)
        state = pruner.wrap_optax(make()).init(params)
        ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf), state.inner_state)
        state = state._replace(inner_state=ones, count=jnp.int32(2))
        after = pruner.settle(state, jax.jit(pruner.update_state)(state, params, grads), params)
        old, new = (np.asarray(s.masks["dense"]["kernel"]) for s in (state, after))
        grown = (old == 0) & (new == 1)
        assert 20 < grown.sum() < 100
        moments = [leaf for leaf in jax.tree.leaves(after.inner_state) if leaf.shape == (16, 24)]
        assert len(moments) == 2
        for moment in moments:
            np.testing.assert_array_equal(np.asarray(moment), np.where(grown, 0, 1))
        others = [leaf for leaf in jax.tree.leaves(after.inner_state) if leaf.shape in ((), (24,), (8,))]
        assert others and all(bool((leaf == 1).all()) for leaf in others)


@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_masks_that_move_keep_their_weights_at_any_scale(algorithm: str) -> None:
    """Adding 1e-5 to the largest score, as JaxPruner does, changes nothing where scores are large."""
    pruner = updater(algorithm, drop_fraction=0.3)
    wrapped = pruner.wrap_optax(optax.sgd(0.0))
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 300.0), parameters())  # all alike: ties everywhere
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e6), parameters())
    state = wrapped.init(params)._replace(count=jnp.int32(2))
    old = np.asarray(state.masks["dense"]["kernel"])
    _, state = jax.jit(wrapped.update)(grads, state, params)
    new = np.asarray(state.masks["dense"]["kernel"])
    fraction = float(optax.cosine_decay_schedule(0.3, 8)(2))
    assert new.sum() == old.sum() == 115
    assert (old & new).sum() >= np.round(115 * (1 - fraction))


@pytest.mark.slow
def test_masks_of_large_arrays_keep_their_number_of_weights() -> None:
    """The share of kept weights in float32, from which JaxPruner counts them again, is off by one here."""
    size, kept, one = 20_000_000, 2_528_791, np.float32(1)
    share = np.float32(kept) / np.float32(size)
    assert int(np.round(np.float32(size) * (one - (one - share)))) == kept + 1
    mask = (jnp.arange(size) < kept).astype(jnp.uint8)
    scores = jnp.arange(size, dtype=jnp.float32)
    pruner = updater("set")
    assert isinstance(pruner, qjax.SET)
    assert int(pruner._moved(mask, scores, scores, 0.1).sum()) == kept


def test_n_by_m_masks_do_not_move() -> None:
    with pytest.raises(QmoeError, match="E_VALUE"):
        updater("rigl", sparsity_type="nm_2,4")
    updater("static_sparse", sparsity_type="nm_2,4")


@pytest.mark.parametrize("kind", ["block_4,2", "channel_1"])
def test_blocks_and_channels_move_as_a_whole(kind: str) -> None:
    history, _, _ = train(updater("rigl", sparsity_type=kind, drop_fraction=0.5))
    assert not equal(history[0], history[-1])
    for masks in history:
        mask = np.asarray(masks["dense"]["kernel"])
        assert mask.sum() == history[0]["dense"]["kernel"].sum()
        blocks = mask.reshape(4, 4, 12, 2).transpose(0, 2, 1, 3).reshape(48, 8) if kind[0] == "b" else mask.T
        assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("skip", [False, True])
def test_types_of_updates_may_differ_from_those_of_gradients(skip: bool) -> None:
    pruner = updater("magnitude", skip_gradients=skip)
    wrapped = pruner.wrap_optax(optax.chain(optax.scale(1.0), upcast()))
    params = parameters()
    state = wrapped.init(params)._replace(count=jnp.int32(2))
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    updates, state = jax.jit(wrapped.update)(grads, state, params)
    assert updates["dense"]["kernel"].dtype == jnp.float32
    assert bool((updates["dense"]["kernel"] == 0).all()) is skip


def upcast() -> Any:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_arguments_of_update_reach_scores_and_optimizer() -> None:
    seen: dict[str, Any] = {}

    class Recording(qjax.MagnitudePruning):
        def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
            seen["scores"] = kwargs
            return super().calculate_scores(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen["optimizer"] = extra
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    wrapped = Recording(qjax.OneShotSchedule(0)).wrap_optax(inner)
    params = parameters()
    wrapped.update(params, wrapped.init(params), params, value=1.5)
    assert seen == {"scores": {"value": 1.5}, "optimizer": {"value": 1.5}}
    with pytest.raises(QmoeError, match="E_MISSING"):
        wrapped.update(params, wrapped.init(params))


def test_only_what_changes_passes_through_the_condition() -> None:
    def outputs(algorithm: str) -> list[int]:
        wrapped = updater(algorithm).wrap_optax(optax.adam(0.05))
        params = parameters()
        jaxpr = jax.make_jaxpr(wrapped.update)(params, wrapped.init(params), params)
        return [len(eqn.outvars) for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]

    assert outputs("magnitude") == [2]  # two masks, and none of Adam's moments
    assert outputs("no_prune") == outputs("static_sparse") == outputs("magnitude_ste") == []
    assert outputs("rigl") == [2]
    assert outputs("acdc")[0] == 2


def test_a_subclass_may_change_all_of_the_state() -> None:
    class Custom(qjax.MagnitudePruning):
        def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
            new = super().update_state(sparse_state, params, grads, **kwargs)
            return new._replace(target_sparsities=jax.tree.map(lambda s: s / 2, new.target_sparsities))

    pruner = Custom(qjax.OneShotSchedule(1), sparsity_distribution_fn=partial(qjax.uniform, sparsity=0.8))
    for jit in (False, True):
        _, _, state = train(pruner, jit=jit)
        assert float(state.target_sparsities["dense"]["kernel"]) == pytest.approx(0.4)

    class Wrong(qjax.MagnitudePruning):
        def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
            return sparse_state._replace(masks=None)

    with pytest.raises(QmoeError, match="E_SHAPE"):
        train(Wrong(qjax.OneShotSchedule(1), sparsity_distribution_fn=partial(qjax.uniform, sparsity=0.8)))


def test_training_inside_of_scan() -> None:
    pruner = updater("rigl")
    wrapped = pruner.wrap_optax(optax.adam(0.05, eps=0.3))
    params = parameters()
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[parameters(step + 1) for step in range(STEPS)])

    @jax.jit
    def run(carry: Any, grads: Any) -> Any:
        def step(carry: Any, grad: Any) -> Any:
            params, state = carry
            updates, state = wrapped.update(grad, state, params)
            params = pruner.post_gradient_update(optax.apply_updates(params, updates), state)
            return (params, state), state.masks

        return jax.lax.scan(step, carry, grads)

    (_, state), masks = run((params, wrapped.init(params)), grads)
    history, _, _ = train(pruner)
    for step in range(STEPS):
        assert equal(jax.tree.map(lambda leaf, step=step: leaf[step], masks), history[step])
    assert int(state.count) == STEPS


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import qmoe_core.jax as qjax
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
for algorithm in ("magnitude", "global_magnitude", "rigl"):
    pruner = qjax.create_updater_from_config({"algorithm": algorithm, "dist_type": "erk", "sparsity": 0.7,
        "update_freq": 1, "update_start_step": 1, "update_end_step": 4})
    wrapped = pruner.wrap_optax(optax.adam(0.05))
    rng = np.random.default_rng(0)
    whole = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in (("x", (16, 24)), ("y", (24, 8)))}
    split = jax.device_put(whole, NamedSharding(mesh, P("a", "b")))
    ends = []
    for params in (whole, split):
        state = jax.jit(wrapped.init)(params)
        for step in range(6):
            updates, state = jax.jit(wrapped.update)(jax.tree.map(lambda p: jnp.cos(p + step), params), state, params)
            params = pruner.post_gradient_update(optax.apply_updates(params, updates), state)
        ends.append(state.masks)
    assert len(params["x"].sharding.device_set) == 4
    for name in whole:
        np.testing.assert_array_equal(*(np.asarray(masks[name]) for masks in ends))
"""


def test_sharded_parameters_get_the_same_masks() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "jax.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names = {"params": {"mlp": {"up": {"kernel": jnp.ones((8, 4))}}}, "batch": jnp.ones((3, 8))}
    names["loss"] = lambda params, batch: jnp.sum(jnp.square(batch @ params["mlp"]["up"]["kernel"] - 1))  # type: ignore[assignment]
    exec(first, names)
    exec("state = state._replace(count=state.count + 5000)\nparams, state = step(params, state, batch)", names)
    assert int((names["params"]["mlp"]["up"]["kernel"] != 0).sum()) == 7  # of 32; 80 % are 25 whole weights
    exec(second, names)
    assert set(np.load("masks.npz").files) == {"model.mlp.up_proj.weight", "__qmoe_masks__"}
    rows = re.findall(r"^\| (`.*?) \| (`.*?) \|", text, re.MULTILINE)
    algorithms, classes = (re.findall(r"`([\w-]+)`", " ".join(column)) for column in zip(*rows[:9], strict=True))
    assert sorted(algorithms) == sorted(qjax.all_algorithm_names()) and len(classes) == len(algorithms)
    assert all(
        qjax.ALGORITHM_REGISTRY[name] is getattr(qjax, made) for name, made in zip(algorithms, classes, strict=True)
    )
