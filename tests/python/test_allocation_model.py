"""Allocation on real (tiny) checkpoints: sizes, losses, recipes that fit their budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_fixtures import tiny_model
from typer.testing import CliRunner

from qmoe_core.allocation import (
    CompressedTrials,
    Item,
    bytes_for_bits,
    measure_sensitivity,
    plan_fit,
    weight_errors,
)
from qmoe_core.checkpoint import compress
from qmoe_core.cli.app import app
from qmoe_core.errors import QmoeError
from qmoe_core.evaluation import evaluate
from qmoe_core.formats import PackedTensor
from qmoe_core.generation import load_model
from qmoe_core.recipe import Recipe, Rule
from qmoe_core.source import SourceCheckpoint

CANDIDATES = (
    {"format": "ternary"},
    {"format": "int2", "group": 32},
    {"format": "int4", "group": 32},
    {"format": "int8", "group": 32},
    {"format": "keep"},
)
FAMILIES = ("qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, 16 * 8)


@pytest.fixture(scope="module")
def items(source, tokens) -> list[Item]:
    return measure_sensitivity(source, tokens, CANDIDATES, window=16)


def test_measured_items_are_what_compress_and_evaluate_say(source, tokens, items, tmp_path):
    item = items[1]
    reference = load_model(source, dtype=torch.float32)
    for number in (0, 2):
        report = compress(source, tmp_path / str(number), Recipe((Rule.make(**item.candidates[number].settings),)))
        assert next(e.nbytes for e in report.tensors if e.name == item.name + "_qmoe") == item.candidates[number].nbytes
        # A model with this one tensor changed, by the public way: the packed module's decoded weights.
        packed = load_model(report.output, dtype=torch.float32)
        changed = load_model(source, dtype=torch.float32)
        module, _, parameter = item.name.rpartition(".")
        weight = getattr(changed.get_submodule(module), parameter)
        record = PackedTensor(getattr(packed.get_submodule(module), parameter + "_qmoe").numpy())
        stack = torch.from_numpy(np.stack([record.decode(expert) for expert in range(record.experts)]))
        with torch.no_grad():
            weight.copy_(stack if stack.shape == weight.shape else stack.transpose(1, 2))
        result = evaluate(changed, tokens, reference=reference, window=16)
        assert result.kl == pytest.approx(item.candidates[number].loss, rel=1e-3, abs=1e-7)
    assert [c.settings["format"] for c in item.candidates] == ["ternary", "int2", "int4", "int8"]  # not "keep"


def test_trials_from_compressed_directories_equal_direct_ones(source, tokens, items, tmp_path):
    directories = []
    for number, settings in enumerate(CANDIDATES[:3]):
        directories.append(compress(source, tmp_path / str(number), Recipe((Rule.make(**settings),))).output)
    again = measure_sensitivity(source, tokens, CANDIDATES[:3], window=16, trial=CompressedTrials(directories))
    for ours, theirs in zip(again, items, strict=True):
        assert [c.nbytes for c in ours.candidates] == [c.nbytes for c in theirs.candidates[:3]]
        np.testing.assert_allclose(
            [c.loss for c in ours.candidates], [c.loss for c in theirs.candidates[:3]], rtol=1e-3, atol=1e-7
        )


def test_every_feasible_budget_is_kept_and_nearly_used(source, items, tmp_path):
    with pytest.raises(QmoeError) as error:
        plan_fit(source, 1, items)
    assert error.value.code == "E_VALUE"
    smallest = int(str(error.value.expected).split()[1])
    largest = smallest + sum(item.candidates[-1].nbytes - item.candidates[0].nbytes for item in items)
    losses = []
    for number, budget in enumerate(np.linspace(smallest, largest, 4).astype(int).tolist()):
        plan = plan_fit(source, budget, items)
        report = compress(source, tmp_path / str(number), plan.recipe)
        assert report.bytes_on_disk <= plan.predicted_bytes <= budget
        # The estimate of texts leaves kilobytes, not more.
        assert plan.predicted_bytes - report.bytes_on_disk < 20_000
        losses.append(plan.allocation.loss)
        json.dumps(plan.to_dict())
    assert losses == sorted(losses, reverse=True)


def test_several_shards_fit_too(source, items, tmp_path):
    first = plan_fit(source, 10**9, items, max_shard_bytes=20_000)
    budget = first.overhead + sum(item.candidates[1].nbytes for item in items)
    plan = plan_fit(source, budget, items, max_shard_bytes=20_000)
    report = compress(source, tmp_path / "out", plan.recipe, max_shard_bytes=20_000)
    assert len(report.files) > 3
    assert report.bytes_on_disk <= budget


def test_bits_count_the_whole_directory(source, items, tmp_path):
    with SourceCheckpoint(source) as checkpoint:
        budget = bytes_for_bits(40.0, checkpoint)  # most of it texts: the model is tiny
        with pytest.raises(QmoeError):
            bytes_for_bits(0.0, checkpoint)
    report = compress(source, tmp_path / "out", plan_fit(source, budget, items).recipe)
    assert report.bits_per_parameter <= 40.0


def test_items_of_another_model_are_refused(source):
    with pytest.raises(QmoeError, match="no weights of this model"):
        plan_fit(source, 10**9, [Item("model.layers.99.x", 1, ())])


def test_roles_without_weights_are_refused(source, tokens):
    with pytest.raises(QmoeError) as error:
        measure_sensitivity(source, tokens, CANDIDATES, roles=("shared_expert",), window=16)
    assert error.value.code == "E_VALUE"


def test_weight_errors_need_no_tokens(source):
    items = weight_errors(source, CANDIDATES, roles=("expert", "attention"))
    assert {item.role for item in items} == {"expert", "attention"}
    for item in items:
        losses = [candidate.loss for candidate in item.candidates]
        assert (losses[-1] == 0.0) == (item.role == "attention")  # "keep"
        assert losses[1] > losses[2] > losses[3] > 0  # 2, 4 and 8 bits
    plan_fit(source, 10**9, items)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("qwen")
    tiny_model("qwen3_moe").save_pretrained(directory)
    return directory


def test_command_line_keeps_the_budget(qwen, tmp_path):
    def run(*options: str) -> tuple[int, dict]:
        result = CliRunner().invoke(app, ["compress", str(qwen), "-o", str(tmp_path / "out"), "--json", *options])
        return result.exit_code, json.loads(result.stdout)

    code, failed = run("--fit", "1kB", "--allow", "attention")
    assert code == 3 and "smallest size" in json.dumps(failed)
    code, report = run("--fit", "200kB", "--allow", "attention")
    assert code == 0 and report["bytes_on_disk"] <= 200_000
    assert {entry["role"] for entry in report["tensors"]} >= {"expert"}
    assert report["fit"]["basis"] == "weights" and report["fit"]["budget"] == 200_000
    code, failed = run("--fit", "300kB", "--allow", "attention")
    assert code == 3 and failed["error"]["code"] == "E_CHANGED"


@pytest.mark.parametrize(
    "options", [("--fit", "2MB", "--bits", "3"), ("--allow", "attention"), ("--bits", "3", "-f", "int4")]
)
def test_contradicting_options_are_wrong_usage(qwen, tmp_path, options):
    result = CliRunner().invoke(app, ["compress", str(qwen), "-o", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
