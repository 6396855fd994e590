"""Mapping of checkpoints onto models: every family, compared with what transformers itself loads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packed_fixtures import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file

from qmoe_core.errors import QmoeError
from qmoe_core.families import ModelLayout, analyze
from qmoe_core.source import CheckedReader, SourceCheckpoint
from qmoe_core.store import crc32c


def layout_of(directory) -> ModelLayout:
    with SourceCheckpoint(directory) as source:
        return analyze(directory, {name: tensor.shape for name, tensor in source.tensors.items()})


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, model, directory, layout) of a tiny model saved by transformers, so with real checkpoint names."""
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param).to(torch.bfloat16)
    model.save_pretrained(directory)
    return request.param, model, directory, layout_of(directory)


def test_every_target_yields_the_weights_that_transformers_loads(saved):
    family, model, directory, layout = saved
    loaded = type(model).from_pretrained(directory)
    parameters = dict(loaded.named_parameters())
    assert {t.name for t in layout.targets if t.role == "expert"} == {
        name for name, p in parameters.items() if ".experts." in name and not name.endswith("bias") and p.ndim >= 2
    }
    with SourceCheckpoint(directory) as source:
        for target in layout.targets:
            expected = parameters[target.name].detach().float()
            expected = expected[None] if target.kind == "linear" else expected
            if family == "gpt_oss" and target.kind == "experts":  # stored transposed; ours are always (E, out, in)
                expected = expected.transpose(1, 2)
            matrices = list(target.matrices(source.read))
            assert target.shape == tuple(expected.shape) and len(matrices) == target.shape[0]
            for matrix, reference in zip(matrices, expected, strict=True):
                assert matrix.dtype == torch.float32
                assert torch.equal(matrix, reference), target.name


def test_reading_one_expert_at_a_time_or_one_slice(saved):
    """Streaming: no read returns more than one expert's share of a fused tensor."""
    _, _, directory, layout = saved
    with SourceCheckpoint(directory) as source:
        for target in (t for t in layout.targets if t.role == "expert"):
            largest = 0

            def read(name, index, source=source):
                nonlocal largest
                tensor = source.read(name, index)
                largest = max(largest, tensor.numel())
                return tensor

            alone = list(target.matrices(read))
            assert largest <= target.shape[1] * target.shape[2]
            for together in (2, 100):
                some = list(target.matrices(source.read, 1, together=together))
                assert len(some) == target.shape[0] - 1 and all(map(torch.equal, some, alone[1:]))


ROLE_PARTS = {
    "qwen3_moe": {"router": "mlp.gate.weight", "expert": "mlp.experts.", "attention": "self_attn.q_proj"},
    "mixtral": {"router": "block_sparse_moe.gate.weight", "expert": "block_sparse_moe.experts."},
    "olmoe": {"router": "mlp.gate.weight", "expert": "mlp.experts.", "norm": "self_attn.q_norm"},
    "deepseek_v3": {
        "router": "mlp.gate.e_score_correction_bias",
        "shared_expert": "mlp.shared_experts.up_proj",
        "dense": "layers.0.mlp.up_proj",
        "attention": "kv_a_proj_with_mqa",
        "norm": "kv_a_layernorm",
    },
    "gpt_oss": {"router": "mlp.router.weight", "expert": "gate_up_proj_bias", "attention": "self_attn.sinks"},
    "switch_transformers": {
        "router": "router.classifier",
        "expert": "experts.expert_0.wi",
        "dense": "block.0.layer.1.mlp.wi",
        "attention": "EncDecAttention.q",
        "embedding": "relative_attention_bias",
    },
}


def test_readers_of_parts_know_the_checksums_of_the_whole(saved):
    _, _, directory, layout = saved
    with SourceCheckpoint(directory) as source:
        for target in (t for t in layout.targets if t.role == "expert" and t.sliceable):
            whole, parts = CheckedReader(source), [CheckedReader(source) for _ in range(2)]
            list(target.matrices(whole.read))
            for number, expert in enumerate(range(target.shape[0])):  # 0 and 1, 4 and 5, ... are the first one's
                list(target.matrices(parts[number // 2 % 2].read, expert, expert + 1))
            assert whole.crcs == {
                name: crc32c(source.read(name).flatten().view(torch.uint8).numpy()) for name in target.source_names
            }
            assert parts[1].crcs != whole.crcs
            parts[1].add(parts[0].pieces)
            assert parts[1].crcs == whole.crcs


def test_roles(saved):
    family, _, _, layout = saved
    assert "other" not in layout.roles.values()
    for role, part in {
        "embedding": "embed" if family != "switch_transformers" else "shared",
        **ROLE_PARTS[family],
    }.items():
        found = {name: layout.roles[name] for name in layout.roles if part in name}
        assert found and set(found.values()) == {role}, found
    routers = {name for name, role in layout.roles.items() if role == "router"}
    assert not routers & {name for target in layout.targets for name in target.source_names if target.role != "router"}


def edit(directory, target, change):
    """A copy of a saved checkpoint with its tensors changed by `change(tensors)`."""
    target.mkdir()
    (target / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    tiny_model("qwen3_moe").save_pretrained(directory)
    return directory


def test_checkpoint_of_the_bare_model_without_the_prefix(qwen, tmp_path):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    layout = layout_of(edit(qwen, tmp_path / "bare", strip))
    assert {t.name for t in layout.targets} == {t.name for t in layout_of(qwen).targets}


def test_tensors_that_the_model_does_not_know_are_other(qwen, tmp_path):
    extra = edit(qwen, tmp_path / "extra", lambda t: t.update({"model.layers.9.mtp.weight": torch.ones(2, 2)}))
    assert layout_of(extra).roles["model.layers.9.mtp.weight"] == "other"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", r"absent: \[3\]"),
        ("model.layers.1.mlp.gate.weight", "lacks a parameter"),
        ("model.norm.weight", "lacks a parameter"),
    ],
)
def test_missing_tensors(qwen, tmp_path, name, what):
    with pytest.raises(QmoeError, match=what) as error:
        layout_of(edit(qwen, tmp_path / "less", lambda tensors: tensors.pop(name)))
    assert error.value.code == "E_MISSING"


def test_a_missing_projection_of_all_experts(qwen, tmp_path):
    def drop(tensors):
        for name in [n for n in tensors if "layers.1" in n and "up_proj" in n]:
            del tensors[name]

    with pytest.raises(QmoeError, match="part of the experts") as error:
        layout_of(edit(qwen, tmp_path / "less", drop))
    assert error.value.code == "E_MISSING"


def test_a_wrongly_shaped_expert(qwen, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    directory = edit(qwen, tmp_path / "bad", lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    layout = layout_of(directory)
    target = next(t for t in layout.targets if t.name == "model.layers.1.mlp.experts.down_proj")
    with SourceCheckpoint(directory) as source, pytest.raises(QmoeError) as error:
        list(target.matrices(source.read))
    assert error.value.code == "E_SHAPE"


def tiny_config(name: str, **settings):
    return getattr(transformers, name)(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **settings
    )


@pytest.mark.parametrize(
    ("config", "architecture", "found"),
    [
        (lambda: tiny_config("LlamaConfig", intermediate_size=32), "LlamaForCausalLM", "no expert-like module"),
        (
            lambda: tiny_config(
                "Llama4TextConfig", intermediate_size=32, intermediate_size_mlp=32, num_local_experts=2, head_dim=16,
                interleave_moe_layer_step=1, pad_token_id=0,
            ),
            "Llama4ForCausalLM",
            "Llama4TextExperts .gate_up_proj .2, 32, 64.",
        ),
        (
            lambda: transformers.DbrxConfig(
                d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=32,
                ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
                attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
            ),
            "DbrxForCausalLM",
            "DbrxExpertGLU",
        ),
    ],
)  # fmt: skip
def test_unknown_layouts_list_what_was_found(tmp_path, config, architecture, found):
    config = config()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(QmoeError, match=found) as error:
        analyze(tmp_path, {})
    assert error.value.code == "E_LAYOUT"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unheard_of"},
        {"architectures": ["UnheardOfForCausalLM"]},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "custom_code"},
    ],
)
def test_unknown_and_quantized_models(qwen, tmp_path, change):
    config = json.loads((qwen / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(QmoeError) as error:
        analyze(tmp_path, {})
    assert error.value.code == "E_LAYOUT"
