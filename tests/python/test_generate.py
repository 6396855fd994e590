"""Loading and generating through the library's own two functions."""

from __future__ import annotations

import pytest
import torch
from packed_fixtures import FAMILIES, pack_modules, tiny_model, write_checkpoint
from transformers.utils import logging as transformers_logging

import qmoe_core
from qmoe_core.errors import QmoeError
from qmoe_core.generation import generate, load_model, load_tokenizer


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + t % 26) for t in tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    model = tiny_model(request.param)
    return write_checkpoint(model, pack_modules(model), tmp_path_factory.mktemp(request.param))


def test_load_and_generate(directory, capsys):
    model = load_model(directory)
    assert not model.training and model.dtype == torch.float32
    seen: list[int] = []
    model.generation_config.eos_token_id = None  # random models end at random
    result = generate(model, Letters(), "once upon", 6, on_token=seen.append)
    assert len(result.tokens) == 6 and seen == result.tokens
    assert result.prompt_tokens == 9 and result.text == Letters().decode(result.tokens)
    assert result.tokens_per_second > 0 and 0 < result.first_token_seconds <= result.seconds
    assert generate(model, Letters(), "once upon", 6).tokens == result.tokens
    assert set(result.to_dict()) >= {"text", "tokens", "tokens_per_second"}
    assert capsys.readouterr().out == ""


def test_dtype_and_silence(directory, capsys):
    enabled = transformers_logging.is_progress_bar_enabled()
    model = load_model(directory, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert "Loading" not in capsys.readouterr().err
    assert transformers_logging.is_progress_bar_enabled() == enabled


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen3_moe")
    model.generation_config.eos_token_id = None
    return model


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone(model):
    def sample(seed: int) -> list[int]:
        return generate(model, Letters(), "abc", 12, temperature=1.5, top_p=0.95, seed=seed).tokens

    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(1) == first and sample(2) != first


def test_one_token_has_no_rate(model):
    result = generate(model, Letters(), "abc", 1)
    assert len(result.tokens) == 1 and result.tokens_per_second == 0.0


def test_empty_prompt_starts_with_the_begin_token(model):
    result = generate(model, Letters(), "", 3)
    assert result.prompt_tokens == 1 and len(result.tokens) == 3
    bare = tiny_model("qwen3_moe", bos_token_id=None)
    with pytest.raises(QmoeError) as caught:
        generate(bare, Letters(), "", 3)
    assert caught.value.code == "E_VALUE"


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_refuses_bad_arguments(model, options):
    with pytest.raises(QmoeError) as caught:
        generate(model, Letters(), "abc", **{"max_new_tokens": 2, **options})
    assert caught.value.code == "E_VALUE"


def test_refuses_what_is_no_checkpoint(tmp_path):
    def refused(code: str) -> None:
        with pytest.raises(QmoeError) as caught:
            load_model(tmp_path)
        assert caught.value.code == code and caught.value.file

    refused("E_MISSING")
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    refused("E_MISSING")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("E_UNSAFE_SOURCE")
    with pytest.raises(QmoeError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "E_MISSING"


def test_public_names():
    assert qmoe_core.load_model is load_model and qmoe_core.generate is generate
