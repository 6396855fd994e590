"""qmoe_core.jax: masks, schedules and distributions, against JaxPruner and where that fails."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_core import QmoeError

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import jax_scenarios as scenarios  # noqa: E402

import qmoe_core.jax as qjax  # noqa: E402

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "jax" / "jaxpruner.npz"
Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def ours() -> Results:
    return scenarios.run(qjax, scenarios.extensions)


def same(found: Results, expected: Results) -> list[str]:
    """Names of results that differ; masks and counts in any bit, other numbers by more than rounding."""
    assert found.keys() == expected.keys()
    different = []
    for name, value in expected.items():
        equal = (
            np.allclose(found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
            if value.dtype.kind == "f"
            else np.array_equal(found[name], value)
        )
        if not equal or found[name].shape != value.shape:
            different.append(name)
    return different


def test_everything_equals_what_jaxpruner_was_recorded_to_do(ours: Results) -> None:
    with np.load(RECORDED, allow_pickle=False) as file:
        expected = scenarios.unpack(dict(file))
    assert len(expected) > 1500 and sum(name.startswith("mask ") for name in expected) > 500
    assert same(ours, expected) == []


@pytest.mark.slow
def test_everything_equals_jaxpruner_where_it_is_installed(ours: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(jax, "tree_map"):  # which JaxPruner uses, and newer versions of jax do not have
        monkeypatch.setattr(jax, "tree_map", jax.tree.map, raising=False)
    theirs = scenarios.run(pytest.importorskip("jaxpruner"))
    assert same({name: value for name, value in ours.items() if name in theirs}, theirs) == []


def test_the_recording_survives_packing() -> None:
    values = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.float32(1.5), "c": np.zeros((0, 2), np.float32)}
    unpacked = scenarios.unpack(scenarios.pack({name: np.asarray(value) for name, value in values.items()}))
    assert unpacked.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(unpacked[name], value)


def reference(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Unstructured by sorting; NaN last, lower indices first."""
    flat = np.where(np.isnan(scores), -np.inf, scores.astype(np.float64)).reshape(-1)
    count = max(1, int(np.round(np.float32(flat.size) * (np.float32(1) - np.float32(sparsity)))))
    mask = np.zeros(flat.size, np.uint8)
    mask[np.argsort(-flat, kind="stable")[:count]] = 1
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "int8", "uint8"])
@pytest.mark.parametrize("jit", [False, True])
def test_the_search_for_a_threshold_is_a_sort(dtype: str, jit: bool) -> None:
    topk: Any = qjax.get_topk_fn(qjax.Unstructured())
    topk = jax.jit(topk) if jit else topk
    rng = np.random.default_rng(0)
    for shape in ((1,), (5, 7), (64, 33)):
        scores = jnp.asarray(rng.normal(size=shape) * 50, jnp.float32).astype(dtype)
        for sparsity in (0.0, 0.013, 0.5, 0.99, 1.0):
            mask = topk(scores, sparsity)
            assert mask.dtype == jnp.uint8
            np.testing.assert_array_equal(mask, reference(np.asarray(scores.astype(jnp.float32)), sparsity))


def test_odd_scores_have_an_order() -> None:
    scores = jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0, jnp.inf, -1.0, jnp.nan, 1e-45, -1e-45], jnp.float32)
    topk = qjax.get_topk_fn(qjax.Unstructured())
    for count in range(1, 10):
        mask = topk(scores, 1 - count / 9)
        assert int(mask.sum()) == count
        if count <= 4:  # inf, then the three zeros (denormals may be flushed), whatever their sign, by index
            assert mask[4] == 1 and mask[0] == mask[1] == mask[6] == 0
    assert topk(scores, 1 - 8 / 9)[0] == 1 and topk(scores, 1 - 8 / 9)[6] == 0


def test_ties_go_to_lower_indices_but_with_n_by_m_to_higher_ones() -> None:
    ones = jnp.ones((2, 4))
    assert qjax.get_topk_fn(qjax.Unstructured())(ones, 0.5).tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    for m, axis in ((4, -1), (2, 0)):
        mask = qjax.get_topk_fn(qjax.NByM(m // 2, m, axis))(ones, 0.5)
        assert mask.tolist() == ([[0, 0, 1, 1]] * 2 if axis else [[0] * 4, [1] * 4])
    wide = qjax.get_topk_fn(qjax.NByM(4, 16))(jnp.ones((1, 32)), 0.5)  # m for which groups are sorted
    assert wide.tolist() == [([0] * 12 + [1] * 4) * 2]


@pytest.mark.parametrize("shape", [(9, 8), (5, 5), (4, 9, 3), (6,)])
@pytest.mark.parametrize("mean", [True, False])
def test_blocks_at_ragged_ends_are_smaller(shape: tuple[int, ...], mean: bool) -> None:
    """JaxPruner leaves masks too small where less than half a block is left."""
    scores = np.abs(np.random.default_rng(3).normal(size=shape)).astype(np.float32)
    mask = np.asarray(qjax.get_topk_fn(qjax.Block((4, 2), mean))(jnp.asarray(scores), 0.5))
    assert mask.shape == shape
    matrix = scores.reshape(1, -1) if scores.ndim == 1 else scores
    blocks = {
        (i, j): matrix[i : i + 4, j : j + 2] for i in range(0, matrix.shape[0], 4) for j in range(0, matrix.shape[1], 2)
    }
    pooled = {place: block.mean() if mean else block.max() for place, block in blocks.items()}
    kept = sorted(pooled, key=lambda place: -pooled[place])[: round(len(blocks) / 2)]
    for (i, j), block in blocks.items():
        expected = np.full(block.shape, (i, j) in kept, np.uint8)
        np.testing.assert_array_equal(mask.reshape(matrix.shape)[i : i + 4, j : j + 2], expected)


def test_types_are_read_from_text() -> None:
    assert qjax.parse_type("nm_2,4") == qjax.parse_type("2:4") == qjax.NByM(2, 4)
    assert qjax.parse_type("block_4,2") == qjax.parse_type("4x2") == qjax.parse_type("block:4x2") == qjax.Block((4, 2))
    assert qjax.parse_type("channel_-1") == qjax.Channel(-1)
    assert qjax.parse_type("unstructured") == qjax.Unstructured()
    for text in ("", "nm", "2:4:6", "channel", "nm_x,4", "block_4"):
        with pytest.raises(QmoeError, match="E_UNKNOWN"):
            qjax.parse_type(text)
    for text in ("5:4", "0:4", "block_0,2"):
        with pytest.raises(QmoeError, match="E_VALUE"):
            qjax.parse_type(text)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(QmoeError, match="E_SHAPE"):
        qjax.get_topk_fn(qjax.NByM(2, 4))(jnp.ones((4, 6)), 0.5)
    with pytest.raises(QmoeError, match="E_SHAPE"):
        qjax.get_topk_fn(qjax.Channel(2))(jnp.ones((4, 6)), 0.5)
    with pytest.raises(QmoeError, match="E_UNKNOWN"):
        qjax.get_topk_fn("2:4")  # type: ignore[arg-type]


def test_masks_set_to_zero_whatever_was_there() -> None:
    params = jnp.array([jnp.nan, jnp.inf, 1.0, -2.0, 3.0])
    mask = jnp.array([0, 0, 1, 0, 1], jnp.uint8)
    for packed in (False, True):
        given = qjax.pack_masks(mask) if packed else mask
        assert qjax.apply_mask(params, given, packed).tolist() == [0, 0, 1, 0, 3]
    assert qjax.apply_mask(params, None) is params
    assert qjax.apply_mask(params.astype(jnp.bfloat16), mask).dtype == jnp.bfloat16


def test_packed_masks_unpack() -> None:
    rng = np.random.default_rng(0)
    params = {"a": jnp.ones((3, 5)), "b": {"c": jnp.ones((2, 4, 2)), "d": jnp.ones(3)}}
    masks: Any = jax.tree.map(lambda p: jnp.asarray(rng.integers(0, 2, p.shape), jnp.uint8), params)
    masks["b"]["d"] = None
    packed = qjax.pack_masks(masks)
    assert packed["a"].shape == (2,) and packed["b"]["d"] is None
    np.testing.assert_array_equal(packed["a"], np.packbits(np.asarray(masks["a"])))
    back = qjax.unpack_masks(packed, params)
    assert back["b"]["d"] is None
    np.testing.assert_array_equal(back["a"], masks["a"])
    np.testing.assert_array_equal(back["b"]["c"], masks["b"]["c"])


def test_a_schedule_that_never_reaches_its_target_warns() -> None:
    def caught(*arguments: int) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            schedule = qjax.PolynomialSchedule(*arguments)
        due = [step for step in range(arguments[2] + 1) if schedule.is_mask_update_iter(step)]
        reached = bool(due) and float(schedule.get_sparsity_at_step(1.0, due[-1])) == 1.0
        assert bool(found) != reached
        return len(found)

    for arguments in ((300, 0, 1000), (7, 20, 20), (10, 3, 9)):
        assert caught(*arguments) == 1
    for arguments in ((100, 0, 1000), (3, 0, 10), (5, 20, 20), (1, 0, 2)):
        assert caught(*arguments) == 0


def test_a_single_update_prunes_no_earlier() -> None:
    schedule = qjax.OneShotSchedule(5)
    for step, expected in ((0, 0.0), (4, 0.0), (5, 0.8), (9, 0.8)):
        found = schedule.get_sparsity_at_step({"a": 0.8, "b": None}, jnp.int32(step))
        assert float(found["a"]) == pytest.approx(expected) and found["b"] is None
    assert [bool(schedule.is_mask_update_iter(step)) for step in (4, 5, 6)] == [False, True, False]


def test_schedules_that_make_no_sense_are_refused() -> None:
    for arguments in ((0, 0, 10), (1, 10, 9)):
        with pytest.raises(QmoeError, match="E_VALUE"):
            qjax.PeriodicSchedule(*arguments)
    with pytest.raises(QmoeError, match="E_VALUE"):
        qjax.PolynomialSchedule(1, 0, None)
    assert bool(qjax.PeriodicSchedule(2, 0, None).is_mask_update_iter(10**6))


def test_erk_keeps_as_many_weights_as_uniform() -> None:
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10), "d": (3, 3, 64, 128)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    for sparsity in (0.3, 0.8, 0.95):
        found = qjax.erk(params, sparsity)
        kept = sum((1 - found[name]) * np.prod(shape) for name, shape in shapes.items())
        assert kept == pytest.approx((1 - sparsity) * sum(np.prod(shape) for shape in shapes.values()), rel=1e-4)


def test_erk_takes_what_jaxpruner_does_not() -> None:
    custom = {"a/kernel": 0.5}
    params = {"a": {"kernel": jnp.zeros((8, 8))}}
    assert qjax.erk(params, 0.9, custom_sparsity_map=custom) == {"a": {"kernel": 0.5}}  # divides by zero there
    assert qjax.erk({"bias": jnp.zeros(4)}, 0.9) == {"bias": None}
    assert qjax.erk(jnp.zeros((8, 8)), 0.75) == 0.75
    assert qjax.erk([jnp.zeros((64, 64)), jnp.zeros((64, 64))], 0.5) == [0.5, 0.5]
    assert qjax.uniform([jnp.zeros((2, 2)), jnp.zeros(2)], 0.5) == [0.5, None]


def test_wrong_sparsities_and_names_are_refused() -> None:
    params = {"a": {"kernel": jnp.zeros((8, 8))}}
    for distribution in (qjax.uniform, qjax.erk):
        for sparsity in (-0.1, 1.1, float("nan")):
            with pytest.raises(QmoeError, match="E_VALUE"):
                distribution(params, sparsity)
        with pytest.raises(QmoeError, match="E_MISSING"):
            distribution(params, 0.5, custom_sparsity_map={"b/kernel": 0.5})
        with pytest.raises(QmoeError, match="E_VALUE"):
            distribution(params, 0.5, custom_sparsity_map={"a/kernel": 2})


def test_summaries_take_trees_of_any_kind() -> None:
    summary = qjax.summarize_sparsity([jnp.array([0.0, 1.0]), None, {"a": jnp.zeros(2)}])
    assert {name: float(value) for name, value in summary.items()} == {
        "0": 0.5, "2/a": 1.0, "_total_sparsity": 0.75, "_nparams_nnz": 1.0, "_nparams": 4.0,
    }  # fmt: skip
    first, second = {"a": jnp.array([1, 1, 0]), "b": None}, {"a": jnp.array([1, 0, 1]), "b": jnp.ones(2)}
    summary = qjax.summarize_intersection(first, second)
    assert {name: float(value) for name, value in summary.items()} == {"a": 0.5, "b": 0.0, "_total_intersection": 0.5}
    assert list(qjax.summarize_intersection(first, second, True)) == ["_total_intersection"]


def test_every_public_class_has_an_example_that_runs() -> None:
    classes = [value for value in vars(qjax).values() if isinstance(value, type) and value.__name__ in qjax.__all__]
    assert classes and all(">>>" in str(value.__doc__) for value in classes)
    attempted = 0
    for module in pkgutil.iter_modules(qjax.__path__):
        results = doctest.testmod(importlib.import_module(f"qmoe_core.jax.{module.name}"))
        assert results.failed == 0
        attempted += results.attempted
    assert attempted > 30


def test_importing_needs_no_torch_and_says_what_is_missing() -> None:
    code = "import sys; sys.modules['torch'] = None; import qmoe_core.jax"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    code = "import sys; sys.modules['optax'] = None; import qmoe_core.jax"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "qmoe-core[jax]" in result.stderr
