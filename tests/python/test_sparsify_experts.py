"""Expert pruning: scores against a plain computation, checkpoints against models cut by hand, refusals, kills."""

from __future__ import annotations

import doctest
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from interruptions import killed
from packed_fixtures import FUSED, inputs_for, tiny_model
from safetensors.torch import save_file

from qmoe_core.calibration import CalibrationSpec
from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import expert_job, prune_experts
from qmoe_core.sparsify.saliency import best_experts

WINDOW, WINDOWS = 16, 6
TOKENS = np.random.default_rng(0).integers(3, 96, WINDOW * WINDOWS)
KEEP = {"qwen3_moe": 3, "mixtral": 2, "olmoe": 4, "deepseek_v3": 4, "gpt_oss": 3}
# As transformers spells it when it saves.
COUNT = {"qwen3_moe": "num_local_experts", "mixtral": "num_local_experts", "olmoe": "num_experts",
         "deepseek_v3": "n_routed_experts", "gpt_oss": "num_local_experts"}  # fmt: skip
ROUTERS = ("gate.weight", "gate.e_score_correction_bias", "router.weight", "router.bias")


def spec_of(**changes: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"source": TOKENS, "window": WINDOW, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model = tiny_model(family)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if "correction_bias" in name:
                        buffer.normal_(0.0, 0.1)
            model.save_pretrained(directory, max_shard_size="40KB")
            made[family] = (model, directory)
        return made[family]

    return make


def plain_sums(model: Any) -> dict[str, np.ndarray]:
    """Tokens, sum of ||f|| and of g ||f|| of every expert, token by token, in float64, in the whole model."""
    sums: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "_apply_gate"):
            continue

        def hook(module, arguments, path=path):
            hidden, index, weight = arguments
            total = sums.setdefault(path, np.zeros((module.num_experts, 3)))
            flat = hidden.reshape(-1, hidden.shape[-1]).double()
            parameters = {name: p.detach().double() for name, p in module.named_parameters()}
            for token in range(len(flat)):
                for expert, gate in zip(index[token].tolist(), weight[token].tolist(), strict=True):
                    up, down = parameters["gate_up_proj"][expert], parameters["down_proj"][expert]
                    if module.is_transposed:
                        up, down = up.T, down.T
                    states = up @ flat[token]
                    states = states + parameters["gate_up_proj_bias"][expert] if module.has_bias else states
                    out = down @ module._apply_gate(states[None])[0]
                    out = out + parameters["down_proj_bias"][expert] if module.has_bias else out
                    norm = float(out.norm())
                    total[expert] += [1, norm, gate * norm]

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=torch.tensor(TOKENS).view(WINDOWS, WINDOW))
    return sums


def cut_by_hand(model: Any, kept: dict[str, tuple[int, ...]], key: str, keep: int) -> Any:
    """The smaller model from the run-time parameters of the larger one, by the names that these tests know."""
    config = type(model.config)(**{**model.config.to_dict(), key: keep})
    small = type(model)(config).eval()
    state = dict(model.state_dict())
    for path, numbers in kept.items():
        block, index = path.rpartition(".")[0], list(numbers)
        for name in state:
            leaf = name.removeprefix(f"{block}.")
            if leaf.startswith("experts.") or leaf in ROUTERS:
                state[name] = state[name][index]
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("family", FUSED)
def test_the_smaller_checkpoint_is_the_model_cut_by_hand(family, sources, tmp_path):
    model, directory = sources(family)
    keep = KEEP[family]
    report = prune_experts(directory, tmp_path / "out", keep, spec_of())
    sums = plain_sums(type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval())
    assert sorted(sums) == sorted(layer.module for layer in report.layers)
    for layer in report.layers:
        tokens, _, weighted = sums[layer.module].T
        assert layer.tokens == tuple(tokens.astype(int))
        expected = weighted / np.maximum(tokens, 1)
        assert np.allclose(layer.scores, expected, rtol=1e-4)
        if family != "deepseek_v3":
            assert layer.kept == tuple(sorted(np.argsort(-expected, kind="stable")[:keep]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[COUNT[family]] == keep
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    by_hand = cut_by_hand(model, {layer.module: layer.kept for layer in report.layers}, COUNT[family], keep)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(small(**inputs_for(model)).logits, by_hand(**inputs_for(model)).logits)
    assert report.parameters < report.original_parameters
    assert report.parameters == sum(p.numel() for p in small.parameters()) + sum(
        b.numel() for n, b in small.named_buffers() if "correction_bias" in n
    )


def test_a_config_that_says_it_by_another_name_does_not_contradict_itself(sources, tmp_path):
    _, directory = sources("qwen3_moe")
    shutil.copytree(directory, tmp_path / "source")
    config = json.loads((directory / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")  # as on the Hub
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    prune_experts(tmp_path / "source", tmp_path / "out", 3, spec_of())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["num_experts"] == 3 and found.get("num_local_experts", 3) == 3
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert small.model.layers[0].mlp.experts.down_proj.shape[0] == 3


def test_draft_heads_with_experts_are_left_out_and_nothing_promises_them(sources, tmp_path):
    _, directory = sources("deepseek_v3")
    shutil.copytree(directory, tmp_path / "source")
    extra = {
        "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(20, 40),
        "model.layers.2.eh_proj.weight": torch.ones(4, 4),
    }
    save_file(extra, tmp_path / "source" / "model-draft.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-draft.safetensors")
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    report = prune_experts(tmp_path / "source", tmp_path / "out", 4, spec_of())
    assert sorted(report.left_out) == sorted(extra)
    plain = prune_experts(directory, tmp_path / "plain", 4, spec_of())
    assert plain.left_out == () and plain.layers == report.layers and plain.parameters == report.parameters
    assert not (tmp_path / "out" / "model-draft.safetensors").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_of_groups_equally_many_are_kept(sources, tmp_path):
    _, directory = sources("deepseek_v3")  # two groups of four
    report = prune_experts(directory, tmp_path / "out", 4, spec_of(), score="frequency")
    for layer in report.layers:
        assert [sum(number // 4 == group for number in layer.kept) for group in range(2)] == [2, 2]
        for group in range(2):
            tokens = [(-layer.tokens[n], n) for n in range(4 * group, 4 * group + 4)]
            assert {n for _, n in sorted(tokens)[:2]} == {n for n in layer.kept if n // 4 == group}


def test_scores_are_what_their_names_say():
    sums = [[4.0, 8.0, 2.0], [2.0, 6.0, 3.0], [0.0, 0.0, 0.0], [10.0, 1.0, 0.9], [1.0, 9.0, 0.1]]
    kept = {score: best_experts(sums, score, 2) for score in ("reap", "frequency", "ean_sum", "ean_mean")}
    assert kept == {"reap": [0, 1], "frequency": [0, 3], "ean_sum": [0, 4], "ean_mean": [1, 4]}
    assert best_experts([[1.0, 1.0, 1.0]] * 4, "reap", 2) == [0, 1]


def test_a_model_that_spoke_to_few_experts_is_the_same_without_the_others(sources, tmp_path):
    """Experts whose router rows say never are the ones that go, and nothing changes."""
    _, directory = sources("gpt_oss")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter[1] = -1e4
    model.save_pretrained(tmp_path / "source")
    report = prune_experts(tmp_path / "source", tmp_path / "out", 0.75, spec_of())
    assert all(layer.kept == (0, 2, 3) for layer in report.layers)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = small(**inputs_for(model)).logits, model(**inputs_for(model)).logits
    assert torch.allclose(found, expected, atol=1e-5)


def code_of(*arguments: Any, **named: Any) -> str:
    with pytest.raises(QmoeError) as caught:
        prune_experts(*arguments, **named)
    return caught.value.code


def test_what_makes_no_sense_is_refused_and_leaves_nothing(sources, tmp_path):
    directory, grouped = sources("qwen3_moe")[1], sources("deepseek_v3")[1]
    out = tmp_path / "out"
    for keep in (0, 5, 1, -1, 1.5, True):  # of 5, with 2 for every token
        assert code_of(directory, out, keep, spec_of()) == "E_VALUE", keep
    for keep in (2, 3, 5, 8):  # of 2 groups of 4
        assert code_of(grouped, out, keep, spec_of()) == "E_VALUE", keep
    assert code_of(directory, out, 3, spec_of(), score="guess") == "E_UNKNOWN"
    assert code_of(directory, out, 3, spec_of(drift=True)) == "E_VALUE"
    assert code_of(directory, directory / "inside", 3, spec_of()) == "E_SAME_FILE"
    assert not out.exists()
    switch = tiny_model("switch_transformers")
    switch.save_pretrained(tmp_path / "switch")
    assert code_of(tmp_path / "switch", out, 3, spec_of()) == "E_LAYOUT"
    prune_experts(directory, out, 3, spec_of())
    assert code_of(directory, out, 4, spec_of()) == "E_CHANGED"


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


def test_killed_at_any_moment_the_same_call_continues_to_the_same_bytes(sources, tmp_path):
    _, directory = sources("olmoe")
    torch.set_num_threads(1)

    def run(output: Path = tmp_path / "out") -> Any:
        return prune_experts(directory, output, 4, spec_of())

    run(tmp_path / "reference")
    for action in ("fsync", "replace", "write"):
        kills = sum(killed(run, point, action) for point in (1, 2, 3, 5, 8, 12, 18, 25))
        assert kills >= 4, action
        run()
        assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")
        assert not (tmp_path / "out" / ".qmoe-journal").exists()
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_the_example_runs():
    result = doctest.testmod(expert_job)
    assert result.failed == 0 and result.attempted > 1
