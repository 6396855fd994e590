"""The whole way: a model, `compress`, `from_pretrained`, and what comes out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from packed_fixtures import FAMILIES, FUSED, expert_modules, inputs_for, tiny_model

from qmoe_core.checkpoint import compress
from qmoe_core.evaluation import encode_text, evaluate, evaluate_all
from qmoe_core.generation import generate, load_model, load_tokenizer
from qmoe_core.recipe import Recipe
from qmoe_core.runtime.experts import PackedExperts
from qmoe_core.runtime.linear import PackedLinear

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    model = tiny_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_eight_bits_change_almost_nothing(source, tmp_path):
    """Experts in the wrong order, gate and up swapped or a forgotten transposition would change everything."""
    model, directory = source
    compress(directory, tmp_path / "out", Recipe.uniform("int8", group=32))
    packed = load_model(tmp_path / "out")
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    assert (logits(packed, inputs) - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "ternary"])
def test_equals_the_original_model_with_decoded_weights(source, tmp_path, name):
    model, directory = source
    compress(directory, tmp_path / "out", Recipe.uniform(name))
    packed = load_model(tmp_path / "out")
    twin = tiny_model(model.config.model_type)
    twin.load_state_dict(model.state_dict())
    replaced = 0
    with torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, PackedExperts):
                for projection in module.shapes:
                    getattr(twin.get_submodule(path), projection).copy_(module.dequantize(projection))
                    replaced += 1
            elif isinstance(module, PackedLinear):
                twin.get_submodule(path).weight.copy_(module.dequantize())
                replaced += 1
    assert replaced == len(expert_modules(model)) * (2 if model.config.model_type in FUSED else 1)
    inputs = inputs_for(model)
    torch.testing.assert_close(logits(packed, inputs), logits(twin, inputs), rtol=1e-4, atol=1e-4)


def test_attention_can_be_packed_too(source, tmp_path):
    model, directory = source
    compress(directory, tmp_path / "out", Recipe.uniform("int8", group=32, role=["expert", "attention"]))
    packed = load_model(tmp_path / "out")
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    assert (logits(packed, inputs) - expected).std() < 0.1 * expected.std()
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again"), inputs), logits(packed, inputs))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The bundled trained model, its int4 version, and 8 windows of text that it has not seen."""
    directory = tmp_path_factory.mktemp("example") / "int4"
    compress(EXAMPLE, directory, Recipe.uniform("int4"))
    tokens = encode_text(EXAMPLE, (EXAMPLE / "text" / "held_out.txt").read_text(encoding="utf-8"))[: 8 * 512]
    return load_model(EXAMPLE, dtype=torch.float32), directory, tokens


def test_a_trained_model_stays_good(example):
    original, directory, tokens = example
    both = evaluate_all({"original": original, "int4": directory}, tokens, reference=original)
    assert 20 < both["original"].perplexity < 80
    assert both["original"].kl == 0
    assert both["original"].perplexity < both["int4"].perplexity < 1.06 * both["original"].perplexity
    assert 0.001 < both["int4"].kl < 0.1
    assert 0.8 < both["int4"].top1_agreement < 1 and 0.9 < both["int4"].router_agreement < 1
    alone = evaluate(directory, tokens, reference=original)
    assert alone.to_dict() | {"seconds": 0} == both["int4"].to_dict() | {"seconds": 0}


def test_bf16_activations_measure_nearly_the_same(example):
    _, directory, tokens = example
    full = evaluate(directory, tokens)
    half = evaluate(load_model(directory, dtype=torch.bfloat16), tokens)
    assert half.perplexity == pytest.approx(full.perplexity, rel=0.01)


def test_a_trained_model_writes_words(example):
    _, directory, _ = example
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    result = generate(model, tokenizer, "It was a dark and stormy night, and", 24)
    words = [word.strip(".,;:!?\"'").lower() for word in result.text.split()]
    assert len(words) > 8 and np.mean([word.isascii() and word.isalpha() for word in words]) > 0.7
    assert {"the", "of", "and", "was", "to", "he", "his", "her", "i", "in", "a"} & set(words)
