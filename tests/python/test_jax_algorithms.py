"""The algorithms of qmoe_core.jax one by one, where JaxPruner's fail or are not to be compared; configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from qmoe_core import QmoeError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax_fixtures import OPTIMIZERS, PERIOD, parameters, train, updater  # noqa: E402

import qmoe_core.jax as qjax  # noqa: E402


def test_acdc_alternates_and_may_reset_the_optimizer(capfd: pytest.CaptureFixture[str]) -> None:
    """JaxPruner's prints every step, unpacks what is not packed, and cannot reset."""
    for packed in (False, True):
        history, _, _ = train(updater("acdc", use_packed_masks=packed))
        sparse = [int(masks["dense"]["kernel"].sum()) == 115 for masks in history]
        assert sparse == [False, False, True, True, False, True, True, False, True, True, True, True]
    assert capfd.readouterr() == ("", "")
    pruner = updater("acdc", reset_optimizer=True)
    wrapped = pruner.wrap_optax(optax.chain(optax.clip(10.0), optax.adam(0.05)))
    params, grads = parameters(), parameters(1)
    state = wrapped.init(params)
    sizes = []
    for _ in range(6):
        _, state = jax.jit(wrapped.update)(grads, state, params)
        sizes.append(float(jnp.abs(state.inner_state[1][0].mu["dense"]["kernel"]).mean()))
    mean = float(jnp.abs(grads["dense"]["kernel"]).mean())
    # mu is 0.1 g after one step from zero, 0.19 g after two; phases change before steps 2, 4 and 5.
    assert sizes == pytest.approx([mean * share for share in (0.1, 0.19, 0.1, 0.19, 0.1, 0.1)], rel=1e-4)


def test_acdc_wants_phases() -> None:
    for wrong in ({"cycle_sparse_steps": 0}, {"cycle_dense_steps": 0}, {"init_dense_steps_end": 10}):
        with pytest.raises(QmoeError, match="E_VALUE"):
            updater("acdc", **wrong)


def test_fisher_scores_come_from_adam_wherever_it_is() -> None:
    pruner = updater("adam-fisher", update_start_step=3, update_end_step=3, reset_adam=True)
    for make in (OPTIMIZERS["injected"], OPTIMIZERS["adamw, clipped"]):
        wrapped = pruner.wrap_optax(make())
        params = parameters()
        state = wrapped.init(params)
        for step in range(4):
            before = state
            _, state = jax.jit(wrapped.update)(parameters(step + 1), state, params)
        (adam,) = [s for s in jax.tree.leaves(before.inner_state, is_leaf=is_adam) if is_adam(s)]
        scores = np.asarray(params["dense"]["kernel"] ** 2 * adam.nu["dense"]["kernel"])
        mask = np.asarray(state.masks["dense"]["kernel"]) == 1
        assert mask.sum() == 115 and scores[mask].min() > scores[~mask].max()
        (after,) = [s for s in jax.tree.leaves(state.inner_state, is_leaf=is_adam) if is_adam(s)]
        # Of one step alone mu is 0.1 g and nu 0.001 g^2, however gradients were clipped.
        np.testing.assert_allclose(after.mu["out"]["bias"] ** 2 / after.nu["out"]["bias"], 10, rtol=1e-3)
        assert int(after.count) == 4
    with pytest.raises(QmoeError, match="E_MISSING"):
        train(pruner, optax.sgd(0.1))
    with pytest.raises(QmoeError, match="E_MISSING"):
        pruner.instant_sparsify(parameters())


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_iterative_n_by_m_ends_as_n_by_m() -> None:
    """JaxPruner's calls a function of three arguments with two."""
    history, _, _ = train(updater("iterative_nm"), optax.sgd(0.0))
    kept = [int(masks["dense"]["kernel"].sum()) for masks in history]
    assert kept[:2] == [384, 384] and kept == sorted(kept, reverse=True) and kept[-1] == 192
    assert 192 < kept[2] < kept[0]
    expected = qjax.get_topk_fn(qjax.NByM(2, 4))(jnp.abs(parameters()["dense"]["kernel"]), 0.5)
    for masks in history:
        assert bool((masks["dense"]["kernel"] >= expected).all())
    np.testing.assert_array_equal(history[-1]["dense"]["kernel"], expected)
    # Beyond n:m the largest of what it keeps stay.
    topk = updater("iterative_nm").topk_fn
    assert topk is not None
    assert topk(jnp.array([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]]), 0.75).tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
    with pytest.raises(QmoeError, match="E_VALUE"):
        updater("iterative_nm", sparsity_type="channel_0")


def test_wanda_compares_within_outputs() -> None:
    rng = np.random.default_rng(0)
    kernel, norms = rng.normal(size=(12, 5)).astype(np.float32), rng.uniform(0.1, 3, 12).astype(np.float32)
    params = {"a": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(5)}}
    given = {"a": {"kernel": jnp.asarray(norms), "bias": None}}
    wanda = qjax.create_updater_from_config({"algorithm": "wanda", "dist_type": "uniform", "sparsity": 0.75})
    for call in (wanda.instant_sparsify, jax.jit(wanda.instant_sparsify)):
        pruned, masks = call(params, input_norms=given)
        mask = np.asarray(masks["a"]["kernel"])
        assert masks["a"]["bias"] is None and (mask.sum(axis=0) == 3).all()
        scores = np.abs(kernel) * norms[:, None]
        for column in range(5):
            assert set(np.flatnonzero(mask[:, column])) == set(np.argsort(-scores[:, column])[:3])
        np.testing.assert_array_equal(pruned["a"]["kernel"], kernel * mask)
    structured = qjax.WandaPruning(
        sparsity_type=qjax.NByM(2, 4, axis=-2), sparsity_distribution_fn=partial(qjax.uniform, sparsity=0.5)
    )
    mask = np.asarray(structured.instant_sparsify(params, input_norms=given)[1]["a"]["kernel"])
    assert (mask.reshape(3, 4, 5).sum(axis=1) == 2).all()
    some = {"dense": {"kernel": jnp.ones(16), "bias": None}, "out": {"kernel": None, "bias": None}}
    _, _, state = train(updater("wanda"), input_norms=some)
    assert (np.asarray(state.masks["dense"]["kernel"]).sum(axis=0) == 5).all()
    with pytest.raises(QmoeError, match="E_MISSING"):
        wanda.instant_sparsify(params)
    with pytest.raises(QmoeError, match="E_SHAPE"):
        wanda.instant_sparsify(params, input_norms={"a": {"kernel": jnp.ones(5), "bias": None}})


def test_wanda_on_stacked_experts() -> None:
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 4)), jnp.float32)
    norms = jnp.asarray(np.random.default_rng(2).uniform(size=(3, 8, 1)), jnp.float32)
    make = partial(qjax.WandaPruning, sparsity_distribution_fn=partial(qjax.uniform, sparsity=0.5))
    _, masks = make(output_axes=(0, -1)).instant_sparsify({"k": kernel}, input_norms={"k": norms})
    assert (masks["k"].sum(axis=1) == 4).all()
    for expert in range(3):
        _, alone = make().instant_sparsify({"k": kernel[expert]}, input_norms={"k": norms[expert, :, 0]})
        np.testing.assert_array_equal(alone["k"], masks["k"][expert])
    with pytest.raises(QmoeError, match="E_SHAPE"):
        make(output_axes=(0, 1, 2)).instant_sparsify({"k": kernel}, input_norms={"k": norms})


def test_norms_of_what_goes_into_flax_layers() -> None:
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3, name="second")(nn.relu(nn.Dense(6, name="first")(x)))

    batches = [jnp.asarray(np.random.default_rng(s).normal(size=(4, 5, 8)), jnp.float32) for s in range(2)]
    variables = Net().init(jax.random.PRNGKey(0), batches[0])
    norms = qjax.dense_input_norms(Net(), variables, batches)
    stacked = np.concatenate([np.asarray(batch).reshape(-1, 8) for batch in batches])
    np.testing.assert_allclose(norms["first"]["kernel"], np.linalg.norm(stacked, axis=0), rtol=1e-5)
    first = variables["params"]["first"]
    hidden = np.maximum(stacked @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)
    np.testing.assert_allclose(norms["second"]["kernel"], np.linalg.norm(hidden, axis=0), rtol=1e-4)
    assert norms["first"]["bias"] is None


def test_straight_through_learns_dense_weights_and_waits_for_its_step() -> None:
    pruner = updater("magnitude_ste", update_start_step=3, update_end_step=3)
    wrapped = pruner.wrap_optax(optax.sgd(0.1))
    params = parameters()
    state = wrapped.init(params)
    shares = []
    for step in range(5):
        shares.append(float((pruner.pre_forward_update(params, state)["dense"]["kernel"] == 0).mean()))
        updates, state = wrapped.update(parameters(step + 1), state, params)
        params = pruner.post_gradient_update(optax.apply_updates(params, updates), state)
        assert int((params["dense"]["kernel"] == 0).sum()) == 0
    assert shares == pytest.approx([0, 0, 0, 0.7, 0.7], abs=0.002)


def test_random_masks_of_short_types_do_not_prefer_low_indices() -> None:
    """Uniform numbers in bfloat16 have some hundred values, and of equal scores the first are kept."""
    params = {"k": jnp.zeros((400, 400), jnp.bfloat16)}
    pruner = qjax.RandomPruning(sparsity_distribution_fn=partial(qjax.uniform, sparsity=0.998))
    mask = pruner.instant_sparsify(params)[1]["k"]
    assert int(mask.sum()) == 320
    assert 120 < int(mask[:200].sum()) < 200  # 160 expected, 9 is one standard deviation; all 320 from bfloat16


def test_global_pruning_begins_dense_and_takes_custom_sparsities() -> None:
    """JaxPruner prunes what has a custom sparsity before the first step, by signed weights."""
    pruner = qjax.create_updater_from_config(
        {"algorithm": "global_magnitude", "sparsity": 0.7, "custom_sparsity_map": {"out/kernel": 0.25}, **PERIOD}
    )
    state = pruner.init_state(parameters())
    assert all(bool((mask == 1).all()) for mask in jax.tree.leaves(state.masks))
    history, _, _ = train(pruner)
    assert int(history[-1]["out"]["kernel"].sum()) == 144 and int(history[-1]["dense"]["kernel"].sum()) == 115
    with pytest.raises(QmoeError, match="E_UNKNOWN"):
        updater("global_magnitude", sparsity_type="nm_2,4")


def test_configurations_of_all_kinds() -> None:
    config = {"algorithm": "magnitude", "dist_type": "uniform", "sparsity": 0.5, "sparsity_type": qjax.NByM(1, 4)}
    pruner = qjax.create_updater_from_config(config | {"update_start_step": None, "filter_fn": qjax.kernels_only})
    assert pruner.sparsity_type == qjax.NByM(1, 4) and isinstance(pruner.scheduler, qjax.NoUpdateSchedule)
    assert pruner.sparsity_distribution_fn is not None
    assert pruner.sparsity_distribution_fn({"kernel": jnp.ones(3), "bias": jnp.ones((2, 2))}) == {
        "kernel": 0.5,
        "bias": None,
    }
    assert len(config) == 4 and config["sparsity_type"] == qjax.NByM(1, 4)  # as it was
    custom = qjax.create_updater_from_config(config | {"custom_sparsity_map": {("a", "kernel"): 0.25}, "rng_seed": 3})
    assert custom.sparsity_distribution_fn is not None
    assert custom.sparsity_distribution_fn({"a": {"kernel": jnp.ones((2, 2))}}) == {"a": {"kernel": 0.25}}
    assert custom.rng.tolist() == jax.random.PRNGKey(3).tolist()


def test_configurations_that_say_too_little_or_too_much_are_refused() -> None:
    good = {"algorithm": "magnitude", "dist_type": "uniform", "sparsity": 0.5}
    for code, wrong in (
        ("E_UNKNOWN", {"algorithm": "nothing"}),
        ("E_UNKNOWN", {"dist_type": "even"}),
        ("E_UNKNOWN", {"sparsity_type": "nm"}),
        ("E_UNKNOWN", {"is_packed": True}),
        ("E_MISSING", {"algorithm": None}),
        ("E_MISSING", {"dist_type": None}),
        ("E_MISSING", {"sparsity": None}),
        ("E_MISSING", {"update_start_step": 1}),
        ("E_MISSING", {"update_start_step": 1, "update_end_step": 5}),
        ("E_MISSING", {"algorithm": "rigl"}),
        ("E_VALUE", {"update_start_step": 5, "update_end_step": 1, "update_freq": 1}),
    ):
        with pytest.raises(QmoeError, match=code):
            qjax.create_updater_from_config(good | wrong)
    with pytest.raises(QmoeError, match="E_VALUE"):
        qjax.create_updater_from_config(good | {"sparsity": 1.5}).init_state(parameters())
    with pytest.raises(QmoeError, match="E_MISSING"):
        updater("saliency").instant_sparsify(parameters())
    with pytest.raises(QmoeError, match="E_VALUE"):
        updater("set").instant_sparsify(parameters())


def test_own_algorithms_have_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_core.jax.config.ALGORITHM_REGISTRY", dict(qjax.ALGORITHM_REGISTRY))

    class Largest(qjax.MagnitudePruning):
        def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
            return jax.tree.map(lambda leaf: -jnp.abs(leaf), params)

    qjax.register_algorithm("largest", Largest)
    pruned, _ = updater("largest").instant_sparsify({"k": jnp.array([[1.0, -5.0, 2.0]])})
    assert pruned["k"].tolist() == [[1.0, 0.0, 0.0]]
