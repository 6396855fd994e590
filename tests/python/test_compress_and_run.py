"""The two halves together: what `compress` writes, `load_model` runs, for every family."""

from __future__ import annotations

import pytest
import torch
from packed_fixtures import FAMILIES, inputs_for, tiny_model, unpack
from safetensors.torch import load_file

import qmoe_core
from qmoe_core.formats import PackedTensor
from qmoe_core.recipe import Recipe, Rule

RECIPES = {
    "int4": Recipe.uniform("int4", group=32),
    "ternary": Recipe.uniform("ternary"),
    "attention too": Recipe((Rule.make(format="int3"), Rule.make(format="int8", role="attention"))),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_computes_with_the_dequantized_weights(family, recipe, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "in")
    report = qmoe_core.compress(tmp_path / "in", tmp_path / "out", RECIPES[recipe])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        for entry in report.tensors:
            weights = unpack(PackedTensor(tensors[entry.name].numpy()))
            if getattr(model.get_submodule(entry.module), "is_transposed", False):
                weights = weights.transpose(1, 2)
            parameter = model.get_parameter(f"{entry.module}.{entry.parameter}")
            parameter.copy_(weights.reshape(parameter.shape))
        inputs = inputs_for(model)
        expected = model(**inputs).logits
        actual = qmoe_core.load_model(tmp_path / "out", dtype=torch.float32)(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
