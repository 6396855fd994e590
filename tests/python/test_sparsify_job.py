"""Pruned checkpoints: every family loads, nothing else changes, kills and damage are survived, errors are typed."""

from __future__ import annotations

import doctest
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from interruptions import killed
from packed_fixtures import FAMILIES, FUSED, inputs_for, tiny_model
from safetensors.torch import load_file

from qmoe_core.calibration import CalibrationSpec
from qmoe_core.errors import QmoeError
from qmoe_core.families import analyze
from qmoe_core.inversion import Inversion
from qmoe_core.source import SourceCheckpoint
from qmoe_core.sparsify import Masks, Pattern, PruneSettings, distribute, load_prune_report, prune, prune_checkpoint
from qmoe_core.sparsify import job as job_module
from qmoe_core.sparsify import pruning as pruning_module
from qmoe_core.sparsify import report as report_module

WINDOW, WINDOWS = 16, 6
TOKENS = np.random.default_rng(0).integers(3, 96, WINDOW * WINDOWS)


def spec_of(**changes: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"source": TOKENS, "window": WINDOW, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """family -> (model, directory), made when first asked for."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model = tiny_model(family)
            model.save_pretrained(directory, max_shard_size="40KB")
            made[family] = (model, directory)
        return made[family]

    return make


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def load(directory: Path, model: Any) -> Any:
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_in_every_family_is_the_model_with_its_masks(family, sources, tmp_path):
    model, directory = sources(family)
    report = prune_checkpoint(directory, tmp_path / "out", PruneSettings("magnitude", "2:4"))
    masks = report.masks()
    masks.check()
    assert report.sparsity == masks.sparsity() == 0.5
    assert [entry.name for entry in report.tensors] == sorted(masks)
    expected = load(directory, model)
    for name in masks:
        weight = expected.get_parameter(name).detach()
        oriented = weight.mT if name in masks.transposed else weight
        assert torch.equal(masks[name], Pattern.parse("2:4").select(oriented.abs()))
    masks.apply(expected)
    found = load(tmp_path / "out", model)
    with torch.no_grad():
        assert torch.equal(found(**inputs_for(model)).logits, expected(**inputs_for(model)).logits)
    before, after = tensors(directory), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    pruned = {name for entry in report.tensors for name in entry.written}
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in pruned), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert load_prune_report(tmp_path / "out").tensors == report.tensors
    assert not (tmp_path / "out" / ".qmoe-journal").exists()
    with SourceCheckpoint(tmp_path / "out") as pruned:  # what is made of it does not get its masks
        assert not {"masks.qmoe", "prune.json"} & set(pruned.copied_files())


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_calibrated_methods_stream_through_every_decoder(family, method, sources, tmp_path):
    model, directory = sources(family)
    roles = ("expert", "attention") if family == "mixtral" else ("expert",)
    settings = PruneSettings(method, "2:4", roles=roles, options={"iterations": 30} if method == "alps" else {})
    report = prune_checkpoint(directory, tmp_path / "out", settings, calibration=spec_of())
    masks, original = report.masks(), load(directory, model)
    masks.check()
    found = load(tmp_path / "out", model)
    for name in masks:
        assert bool((found.get_parameter(name)[~masks.oriented(name)] == 0).all())
        same = torch.equal(found.get_parameter(name), original.get_parameter(name) * masks.oriented(name))
        assert same == (method == "wanda")
    assert any("attn" in name for name in masks) == (family == "mixtral")
    for entry in report.tensors:
        assert len(entry.tokens) == entry.shape[0]
        assert entry.relative_output_error is not None and 0 < entry.relative_output_error < 1
    again = prune_checkpoint(directory, tmp_path / "out", settings, calibration=spec_of())
    assert again.resumed and again.tensors == report.tensors


def expert_inputs(model: Any) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What every experts module of the whole model is given: inputs (T, H) and ids (T, k) by call."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate"):

            def hook(_, arguments, name=name):
                hidden, index = arguments[:2]
                found.setdefault(name, []).append((hidden.reshape(-1, hidden.shape[-1]).clone(), index.clone()))

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=torch.tensor(TOKENS).view(WINDOWS, WINDOW))
    return found


def test_layers_see_what_the_pruned_layers_before_them_make(sources, tmp_path):
    """Wanda's masks of both layers, from norms of the inputs in a whole model that is pruned layer by layer."""
    model, directory = sources("qwen3_moe")
    settings = PruneSettings("wanda", "2:4", options={"prior": 0})
    masks = prune_checkpoint(directory, tmp_path / "out", settings, calibration=spec_of()).masks()
    whole = load(directory, model)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        (hidden, index), *_ = expert_inputs(load_state(whole, directory, model))[name]
        weight = whole.get_parameter(f"{name}.gate_up_proj").detach()
        for expert in range(weight.shape[0]):
            seen = hidden[(index == expert).any(-1)].double()
            assert len(seen) > 4
            scores = weight[expert].double().abs() * seen.norm(dim=0)
            assert torch.equal(masks[f"{name}.gate_up_proj"][expert], Pattern.parse("2:4").select(scores))
        mine = {key: masks[key] for key in masks if key.startswith(name)}
        Masks(mine).apply(whole)


def load_state(whole: Any, directory: Path, model: Any) -> Any:
    """A copy without hooks."""
    copy = load(directory, model)
    copy.load_state_dict(whole.state_dict())
    return copy


@pytest.mark.parametrize("kind", ["erk", "global"])
def test_distributions_are_those_of_all_weights_together(kind, sources, tmp_path):
    model, directory = sources("gpt_oss")
    settings = PruneSettings("magnitude", "unstructured", 0.7, kind)
    masks = prune_checkpoint(directory, tmp_path / "out", settings).masks()
    original = load(directory, model)
    scores = {name: original.get_parameter(name).detach().mT.abs() for name in masks}
    shares = distribute({name: tuple(value.shape) for name, value in scores.items()}, 0.7, kind, scores)
    for name in masks:
        assert torch.equal(masks[name], Pattern.parse("unstructured").select(scores[name], shares[name]))
    assert masks.sparsity() == pytest.approx(0.7, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_time_weights_go_back_into_their_checkpoint_tensors(family, sources):
    _, directory = sources(family)
    with SourceCheckpoint(directory) as checkpoint:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        for target in analyze(directory, shapes).targets:
            inversion = Inversion(target, shapes)
            stack = torch.stack(list(target.matrices(checkpoint.read)))
            for name, index, values in inversion.of(0, stack):
                assert torch.equal(values, checkpoint.read(name, index))
            if not inversion.whole:
                found = [name for name, _, _ in inversion.of(0, stack[:1])]
                assert set(found) <= set(target.source_names)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_killed_at_any_moment_the_same_call_continues_to_the_same_bytes(method, sources, tmp_path):
    _, directory = sources("mixtral")
    torch.set_num_threads(1)
    calibration = None if method == "magnitude" else spec_of()

    def run(output: Path = tmp_path / "out") -> Any:
        return prune_checkpoint(directory, output, PruneSettings(method), calibration=calibration)

    run(tmp_path / "reference")
    expected = hashes(tmp_path / "reference")
    for action in ("fsync", "pwrite", "replace", "ftruncate", "posix_fallocate"):
        points, kills = [1, 2, 3, 4, 5, 8, 12, 18, 25, 35], 0
        for point in points:
            kills += killed(run, point, action)
        assert kills >= 2, action
        run()
        assert hashes(tmp_path / "out") == expected
        assert not (tmp_path / "out" / ".qmoe-journal").exists()
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_damage_to_what_was_finished_is_found_when_it_continues(sources, tmp_path):
    _, directory = sources("olmoe")
    torch.set_num_threads(1)

    def run(output: Path = tmp_path / "out") -> Any:
        return prune_checkpoint(directory, output, PruneSettings("wanda"), calibration=spec_of())

    run(tmp_path / "reference")
    journal = tmp_path / "out" / ".qmoe-journal"
    for damaged in ("model*.part", "mask-00000"):
        assert killed(run, 40, "fsync")
        for part in journal.glob(damaged):
            data = bytearray(part.read_bytes())
            for at in range(len(data) // 2, len(data), 97):
                data[at] ^= 1
            part.write_bytes(data)
        run()
        assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def code_of(*arguments: Any, **named: Any) -> str:
    with pytest.raises(QmoeError) as caught:
        prune_checkpoint(*arguments, **named)
    return caught.value.code


def test_what_makes_no_sense_is_refused_and_leaves_nothing(sources, tmp_path):
    _, directory = sources("qwen3_moe")
    out, two = tmp_path / "out", PruneSettings("magnitude")
    assert code_of(directory, out, PruneSettings("wanda")) == "E_VALUE"
    assert code_of(directory, out, two, calibration=spec_of()) == "E_VALUE"
    assert code_of(directory, out, PruneSettings("wanda"), calibration=spec_of(drift=True)) == "E_VALUE"
    assert code_of(directory, out, two, device="cuda") == "E_NO_KERNEL"
    assert code_of(directory, out, PruneSettings("magnitude", "16:32")) == "E_SHAPE"
    assert code_of(directory, out, PruneSettings("magnitude", roles=("shared_expert",))) == "E_VALUE"
    assert code_of(directory, directory / "inside", two) == "E_SAME_FILE"
    assert code_of(tmp_path / "absent", out, two) == "E_MISSING"
    assert not out.exists() or not any(out.iterdir())
    prune_checkpoint(directory, out, two)
    assert code_of(directory, out, PruneSettings("random")) == "E_CHANGED"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert code_of(directory, tmp_path / "full", two) == "E_VALUE"


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("E_UNKNOWN", {"method": "guess"}),
        ("E_UNKNOWN", {"options": {"rho": 1}}),
        ("E_VALUE", {"pattern": "5:4"}),
        ("E_VALUE", {"pattern": "unstructured"}),
        ("E_VALUE", {"sparsity": 0.6}),
        ("E_VALUE", {"pattern": "unstructured", "sparsity": 2.0}),
        ("E_VALUE", {"pattern": "unstructured", "sparsity": 0.5, "distribution": "some"}),
        ("E_VALUE", {"pattern": "unstructured", "sparsity": 0.5, "distribution": "global"}),
        ("E_VALUE", {"distribution": "erk"}),
        ("E_VALUE", {"roles": ("router",)}),
        ("E_VALUE", {"roles": ()}),
    ],
)
def test_settings_are_checked(code, settings):
    with pytest.raises(QmoeError) as caught:
        PruneSettings(**settings)
    assert caught.value.code == code


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_model_in_memory_becomes_what_its_checkpoint_does(family, sources, tmp_path):
    _, directory = sources(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    roles = ("expert",) if family == "gpt_oss" else ("expert", "shared_expert", "attention")
    masks = prune(model, spec_of(), "sparsegpt", roles=roles, scratch=tmp_path)
    report = prune_checkpoint(
        directory, tmp_path / "out", PruneSettings("sparsegpt", roles=roles), calibration=spec_of()
    )
    expected = load(tmp_path / "out", model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert all(torch.equal(masks[name], mask) for name, mask in report.masks().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("module", [job_module, pruning_module, report_module], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 1


MEASURE = """
import json, sys, numpy
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.sparsify import PruneSettings, prune_checkpoint
text = CalibrationSpec(numpy.arange(4096) % 96, window=64, buffer_bytes=0, chunk_bytes=8 << 20)
for method, calibration in (("magnitude", None), ("sparsegpt", text)):
    for name in ("short", "long"):
        source, output = sys.argv[1] + name, f"{sys.argv[1]}{method}-{name}"
        report = prune_checkpoint(source, output, PruneSettings(method), calibration=calibration)
    added = report.peak_rss_bytes - report.start_rss_bytes
    print(json.dumps([added, report.rss_limit_bytes, report.largest_layer_bytes, report.weights]))
"""


def test_memory_stays_under_the_promise_and_does_not_grow_with_the_model(tmp_path):
    for name, layers in (("short", 1), ("long", 12)):
        sizes = {"num_hidden_layers": layers, "hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8}
        tiny_model("qwen3_moe", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / name)
    result = subprocess.run([sys.executable, "-c", MEASURE, f"{tmp_path}/"], capture_output=True, text=True, check=True)
    for line in result.stdout.splitlines():
        added, limit, layer, weights = json.loads(line)
        assert added <= limit
        # The second run has nothing left to import: what it adds is what the work needs, chunks of 8 MiB included.
        assert 2 * weights > 10 * layer and added <= 6 * layer + (64 << 20), (added, layer)
