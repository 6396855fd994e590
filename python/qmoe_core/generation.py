"""Load a (compressed) checkpoint and generate text from it: thin, typed helpers over transformers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import QmoeError
from .integrations.transformers import register
from .source import PICKLES


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `generate` produced.

    Attributes:
        text: the new text, without the prompt.
        tokens: ids of the new tokens, an end-of-text token included.
        tokens_per_second: new tokens after the first, per second since the first appeared, so that reading the prompt
            does not count; 0.0 where there was only one.
        prompt_tokens: length of the prompt in tokens.
        first_token_seconds: time until the first new token, reading the prompt included.
        seconds: the whole time.
    """

    text: str
    tokens: list[int]
    tokens_per_second: float
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", *, device: str = "cpu", compute: str = "auto",
    **options: Any,
) -> Any:  # fmt: skip
    """A transformers model, in evaluation mode, from a checkpoint directory, compressed or not.

    Args:
        path: the directory (config.json and safetensors files).
        dtype: dtype of everything that is not packed; "auto" is what config.json says.
        device: where to put it: a CPU or a CUDA device.
        compute: how packed layers multiply on a CPU: "int8" (activations rounded to int8; fastest), "float", "stored"
            (as float, without a second copy of the weights in memory), or "auto": int8 for 16-bit activations, else
            float. A GPU has "auto" and "float", which are the same there.
        options: passed on to `from_pretrained`.

    Raises:
        QmoeError: E_MISSING where there is no such directory or no config.json; E_UNSAFE_SOURCE where there are only
            pickle files; E_NO_KERNEL where there is no such device; and what checking the packed tensors refuses.
    """
    import transformers

    register()
    _check_device(device)
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise QmoeError("E_MISSING", "no config.json: not a checkpoint directory", file=directory)
    if not any(directory.glob("*.safetensors")):
        if any(file.suffix in PICKLES for file in directory.iterdir()):
            raise QmoeError("E_UNSAFE_SOURCE", "only pickle files, which can run code and are never opened", file=path)
        raise QmoeError("E_MISSING", "no safetensors file", file=directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with _no_progress_bar():
        model = auto.from_pretrained(directory, dtype=dtype, use_safetensors=True, **options)
    set_compute(model, compute)
    # Not device_map: that needs accelerate, which nothing else here does.
    return model.eval().to(device)


def _check_device(device: str) -> None:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise QmoeError("E_NO_KERNEL", "no such device", expected="cpu or cuda", actual=device) from error
    if place.type not in ("cpu", "cuda", "meta"):
        raise QmoeError("E_NO_KERNEL", "packed layers run on CPUs and CUDA devices", actual=device)
    if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
        raise QmoeError("E_NO_KERNEL", "no such CUDA device", expected=f"{torch.cuda.device_count()} devices",
                        actual=device)  # fmt: skip


def set_compute(model: Any, compute: str) -> None:
    """How the packed layers of a model multiply on a CPU, see `load_model`; QmoeError E_VALUE for another word."""
    from .runtime.experts import PackedExperts
    from .runtime.layouts import COMPUTE
    from .runtime.linear import PackedLinear

    if compute not in COMPUTE:
        raise QmoeError("E_VALUE", "unknown way to compute", expected=list(COMPUTE), actual=compute)
    for module in model.modules():
        if isinstance(module, (PackedExperts, PackedLinear)):
            module.compute = compute


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The checkpoint's tokenizer. Raises QmoeError E_MISSING where the directory holds none."""
    import transformers

    directory = Path(path)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        raise QmoeError("E_MISSING", "the checkpoint directory holds no tokenizer", file=directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A library does not draw on its caller's terminal."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class _Clock:
    """A transformers streamer that notes when tokens appear and passes them on."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self.on_token = on_token
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate() announces the prompt first
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self.on_token is not None:
            self.on_token(int(value.reshape(-1)[0]))

    def end(self) -> None:
        pass


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> GenerateResult:
    """Continue `prompt` by up to `max_new_tokens` tokens.

    Args:
        model: a transformers model, packed or not.
        tokenizer: its tokenizer.
        prompt: text; empty means the model's begin-of-text token.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: nucleus for sampling, in (0, 1].
        seed: makes sampling repeatable, without touching torch's global generator state.
        on_token: called with each new token id as it appears.

    Raises:
        QmoeError: E_VALUE for arguments out of range or an empty prompt where the model has no begin-of-text token.
    """
    if max_new_tokens < 1:
        raise QmoeError("E_VALUE", "max_new_tokens must be at least 1", actual=max_new_tokens)
    if temperature < 0 or not 0 < top_p <= 1:
        raise QmoeError("E_VALUE", "need temperature >= 0 and 0 < top_p <= 1", actual=(temperature, top_p))
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        start = model.config.get_text_config(decoder=True).bos_token_id
        if start is None:
            raise QmoeError("E_VALUE", "the prompt is empty and the model has no begin-of-text token")
        ids = [start]
    inputs = torch.tensor([ids], dtype=torch.long, device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    clock = _Clock(on_token)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None), torch.inference_mode():
        if seed is not None:
            torch.manual_seed(seed)
        started = time.perf_counter()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            pad_token_id=_pad_token(model),
            **sampling,
        )
        finished = time.perf_counter()
    # A decoder-only model returns prompt and continuation, an encoder-decoder one its start token and the continuation.
    skip = 1 if model.config.is_encoder_decoder else len(ids)
    tokens = output[0, skip:].tolist()
    span = clock.times[-1] - clock.times[0] if len(clock.times) > 1 else 0.0
    return GenerateResult(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        tokens_per_second=(len(clock.times) - 1) / span if span > 0 else 0.0,
        prompt_tokens=len(ids),
        first_token_seconds=(clock.times[0] if clock.times else finished) - started,
        seconds=finished - started,
    )


def _pad_token(model: Any) -> int | None:
    """The padding id; where there is none, the first end-of-text id, as generate() would choose, but without its
    warning."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return eos[0] if isinstance(eos, list) and eos else eos
