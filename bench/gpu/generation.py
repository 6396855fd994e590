"""Generating on one GPU: models of real configurations with random weights, experts packed or in bfloat16.

    python bench/gpu/generation.py [--models qwen3-235b-a22b ...] [--formats ternary ...] [--batches 1 16]
        [--output FILE]

A step of decoding, with transformers' static cache, greedy choice included, is captured in a CUDA graph and replayed;
what comes out is fed back. Weights of experts are those of one layer, copied for every other one, so that each has
memory of its own. `--attention int4` packs the linear layers of attention as well. bfloat16 is transformers' own
fastest way through the experts (grouped products), in the same graph. Where a model does not fit the card, that is
recorded.

`bytes_per_token`: what a token reads of weights, experts by how many are chosen. `reading_seconds`: the time that this
takes at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dequantize import copy_bandwidth, write_results
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

from qmoe_core import IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix
from qmoe_core.runtime.cuda import stack_of
from qmoe_core.runtime.experts import PackedExperts
from qmoe_core.runtime.layouts import cached
from qmoe_core.runtime.linear import PackedLinear

PROMPT, GROUP, ZEROS = 32, 128, 0.885


def config(layers: int, hidden: int, heads: int, width: int, vocabulary: int = 151936, experts: int = 128) -> Any:
    return Qwen3MoeConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=width, num_attention_heads=heads, num_key_value_heads=4, head_dim=128,
        vocab_size=vocabulary, tie_word_embeddings=False, norm_topk_prob=True, dtype="bfloat16",
        attn_implementation="sdpa",
    )  # fmt: skip


MODELS = {
    "qwen3-30b-a3b": config(48, 2048, 32, 768),
    "qwen3-235b-a22b": config(94, 4096, 64, 1536),
    "small": config(2, 256, 8, 128, 1000, 16),
}


def sample(name: str, experts: int, rows: int, cols: int) -> PackedTensor:
    """`experts` times the same random matrix."""
    rng = np.random.default_rng(rows)
    scale = np.float32(0.02)
    if name == "ternary":
        drawn, share = rng.random((rows, cols), np.float32), (1 - ZEROS) / 2
        trits = (drawn < share).astype(np.int8) - (drawn > 1 - share).astype(np.int8)
        levels = np.tile(np.array([-0.0625, 0.0625], np.float32), (rows, 1))
        return PackedTensor.pack([TernaryMatrix(TernaryFormat("pair"), trits, levels)] * experts)
    bits = int(name.removeprefix("int"))
    codes = rng.integers(0, 2**bits, (rows, cols), np.uint8)
    scales = np.full((rows, cols // GROUP), scale * 4 / 2**bits, np.float16).astype(np.float32)
    return PackedTensor.pack([IntMatrix(IntFormat(bits, GROUP, False), codes, scales, None)] * experts)


class Weights:
    """Packed tensors by format and shape, each made once; `give` puts them into a module, in memory of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.packed: dict[tuple[str, int, int, int], PackedTensor] = {}
        self.first: dict[tuple[str, int, int, int, str], Any] = {}
        self.nbytes = 0

    def of(self, name: str, experts: int, rows: int, cols: int) -> PackedTensor:
        key = name, experts, rows, cols
        if key not in self.packed:
            self.packed[key] = sample(*key)
        return self.packed[key]

    def settle(self, module: PackedExperts | PackedLinear, name: str) -> None:
        """Layouts on the device: of the first module made from the record, of the others copied."""
        if self.device.type == "cpu":
            return
        for tensor, shape in module.shapes.items():
            record, order = module._buffers[f"{tensor}_qmoe"], module.row_order(tensor)
            key = name, shape.experts, shape.rows, shape.cols, order
            if key not in self.first:
                self.first[key] = stack_of(record, order, self.device)
                stack = self.first[key]
            else:
                stack = copy.copy(self.first[key])
                stack.weights = self.first[key].weights.clone()
                cached(record, order, str(self.device), lambda stack=stack: stack)  # type: ignore[misc]
            self.nbytes += stack.weights.numel()


def build(model_config: Any, name: str, attention: str, device: torch.device) -> tuple[nn.Module, dict[str, float]]:
    """The model on the device, and what a token reads and all parameters are."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(model_config).to(torch.bfloat16).eval()
    weights, hidden, width = Weights(device), model_config.hidden_size, model_config.moe_intermediate_size
    experts, share = model_config.num_experts, model_config.num_experts_per_tok / model_config.num_experts
    parameters, of_experts, read = 0, 0, 0.0
    for layer in model.model.layers:
        of_experts += experts * hidden * width * 3
        if name != "bf16":
            packed = {
                "gate_up_proj": weights.of(name, experts, 2 * width, hidden),
                "down_proj": weights.of(name, experts, hidden, width),
            }
            layer.mlp.experts = PackedExperts.from_packed(layer.mlp.experts, packed)
            weights.settle(layer.mlp.experts, name)
    read += weights.nbytes * share
    if attention != "bf16":
        before = weights.nbytes
        for layer in model.model.layers:
            for key in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(layer.self_attn, key)
                parameters += linear.weight.numel()
                packed_linear = PackedLinear.from_packed(linear, weights.of(attention, 1, *linear.weight.shape))
                weights.settle(packed_linear, attention)
                setattr(layer.self_attn, key, packed_linear)
        read += weights.nbytes - before
    records = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_qmoe")}
    model.to_empty(device=device)
    if device.type == "cpu":  # on others they stay where they are
        for name, buffer in records.items():
            model.get_buffer(name).copy_(buffer)
    with device:  # its buffers are numbers that are computed
        model.model.rotary_emb = type(model.model.rotary_emb)(model_config)
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
        nbytes = parameter.numel() * parameter.element_size()
        if ".experts." in key:
            read += nbytes * share
            continue
        parameters += parameter.numel()
        if "embed_tokens" not in key:
            read += nbytes
    return model, {"parameters": parameters + of_experts, "bytes_per_token": read}


class Decoder:
    """One step for a batch, with a cache that keeps its place."""

    def __init__(self, model: nn.Module, batch: int, length: int, device: torch.device) -> None:
        self.model, self.length = model, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(5, model.config.vocab_size, (batch, PROMPT), generator=generator).to(device)
        self.prompt = prompt
        self.position = torch.full((1,), PROMPT, device=device)
        logits = model(input_ids=prompt, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.ids = logits.argmax(-1, keepdim=True)

    def step(self) -> None:
        mask = (torch.arange(self.length, device=self.ids.device) <= self.position).view(1, 1, 1, -1)
        logits = self.model(
            input_ids=self.ids, past_key_values=self.cache, use_cache=True, position_ids=self.position.view(1, 1),
            attention_mask=mask.expand(len(self.ids), 1, 1, -1),
        ).logits[:, -1]  # fmt: skip
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1


@torch.inference_mode()
def measure(model: nn.Module, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Tokens per second of all sequences together."""
    warm = 3
    decoder = Decoder(model, batch, PROMPT + 2 * tokens + warm + 1, device)
    if device.type == "cpu":
        times = []
        for _ in range(tokens):
            begin = time.perf_counter()
            decoder.step()
            times.append(time.perf_counter() - begin)
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm):
                decoder.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.step()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(tokens + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    step = median(times)
    return {"step_seconds": step, "range": [min(times), max(times)], "tokens_per_second": batch / step}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    bandwidth = copy_bandwidth() if device.type == "cuda" else None
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for packed in arguments.formats:
            attention = "bf16" if packed == "bf16" else arguments.attention
            row: dict[str, Any] = {"model": name, "experts": packed, "attention": attention}
            model_config = copy.deepcopy(MODELS[name])
            if arguments.layers:
                model_config.num_hidden_layers = arguments.layers
            row["layers"] = model_config.num_hidden_layers
            try:
                model, about = build(model_config, packed, attention, device)
            except torch.OutOfMemoryError:
                rows.append(row | {"fits": False})
                print(rows[-1], flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            gc.collect()
            for batch in arguments.batches:
                found = row | {"fits": True, "batch": batch, **about, **measure(model, batch, arguments.tokens, device)}
                if bandwidth is not None:
                    found["gib"] = torch.cuda.memory_allocated() / 2**30
                    found["reading_seconds"] = about["bytes_per_token"] / bandwidth
                    found["copy_bytes_per_second"] = bandwidth
                rows.append(found)
                print(found, flush=True)
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-235b-a22b", "qwen3-30b-a3b"], choices=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=["ternary", "int2", "int4", "bf16"])
    parser.add_argument("--attention", default="bf16", choices=["bf16", "int8", "int4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try it out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = run(arguments)
    if arguments.output:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        write_results(arguments.output, "generation-gpu", rows, device=name, cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    sys.exit(main())
