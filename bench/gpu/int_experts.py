"""Whole layers of int experts on a GPU, beside bfloat16 grouped products, Humming where it is installed, and the
memory's limit.

    python bench/gpu/int_experts.py [--models NAME ...] [--bits 4 2] [--tokens 1 4 16 64 256 1024]
        [--kernels auto] [--output FILE]

Routing is skewed (popularity falls with the square root of the rank) and changes from call to call. Ours takes ids and
weights and gives the combined output; the times of
bfloat16 and of Humming are of grouped gate and up, gate, and grouped down alone, with inputs already sorted by expert.
Medians of CUDA graph replays.
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, copy_bandwidth, microseconds, write_results
from int_linear import by_kernel, times

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor

# experts, chosen ones, hidden size, width
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3": (256, 8, 7168, 2048),
}
GROUP, ROUTINGS = 128, 12


def routings(experts: int, top_k: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    out = []
    for _ in range(ROUTINGS):
        popularity = torch.arange(1, experts + 1).double().rsqrt()[torch.randperm(experts, generator=generator)]
        out.append(torch.multinomial(popularity.expand(tokens, -1), top_k, generator=generator))
    return out


class Projection:
    """Random codes of all experts, prepacked; several copies where one would fit into the cache."""

    def __init__(self, bits: int, experts: int, rows: int, cols: int, order: str, copies: int) -> None:
        rng = np.random.default_rng(bits)
        codes = rng.integers(0, 2**bits, (rows, cols), np.uint8)
        scales = (rng.random((rows, cols // GROUP)) / (2**bits * cols**0.5)).astype(np.float16).astype(np.float32)
        packed = PackedTensor.pack([IntMatrix(IntFormat(bits, GROUP, False), codes, scales, None)] * experts)
        self.matrix = _C.CudaInt(packed.data, order)
        record, stream = torch.from_numpy(packed.data).cuda(), torch.cuda.current_stream().cuda_stream
        first = torch.empty(self.matrix.bytes, dtype=torch.uint8, device="cuda")
        self.matrix.prepack(record.data_ptr(), first.data_ptr(), first.numel(), stream)
        torch.cuda.synchronize()
        self.tiles = [first, *(first.clone() for _ in range(copies - 1))]
        self.bytes_of_expert = self.matrix.bytes / experts


class Ours:
    def __init__(self, bits: int, experts: int, top_k: int, hidden: int, width: int) -> None:
        copies = max(1, -(-CACHE_BYTES * 8 // (bits * experts * hidden * width * 3)))
        self.first = Projection(bits, experts, 2 * width, hidden, "halves", copies)
        self.second = Projection(bits, experts, hidden, width, "plain", copies)
        self.layers = {
            kernel: _C.CudaIntExperts(self.first.matrix, self.second.matrix, "silu", kernel=kernel)
            for kernel in ("auto", "few", "many")
        }
        self.hidden, self.top_k, self.copies = hidden, top_k, copies
        self.bytes_of_expert = self.first.bytes_of_expert + self.second.bytes_of_expert

    def measure(self, routing: list[torch.Tensor], kernel: str) -> dict[str, float]:
        tokens, layer = len(routing[0]), self.layers[kernel]
        x = torch.randn(tokens, self.hidden, device="cuda").bfloat16()
        y = torch.empty_like(x)
        ids = [r.cuda() for r in routing]
        weights = torch.rand(tokens, self.top_k, device="cuda")
        bytes = layer.workspace(tokens, self.top_k)
        workspace = torch.empty(bytes, dtype=torch.uint8, device="cuda")

        def run() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for i, own in enumerate(ids):
                layer.run(
                    self.first.tiles[i % self.copies].data_ptr(), self.second.tiles[i % self.copies].data_ptr(), 0, 0,
                    x.data_ptr(), "bfloat16", tokens, own.data_ptr(), weights.data_ptr(), "float32", self.top_k,
                    y.data_ptr(), workspace.data_ptr(), bytes, stream,
                )  # fmt: skip

        return microseconds(run, len(ids))


class Grouped:
    """bfloat16 by torch's grouped product."""

    def __init__(self, experts: int, top_k: int, hidden: int, width: int) -> None:
        self.experts, self.hidden, self.top_k = experts, hidden, top_k
        self.first = torch.randn(experts, 2 * width, hidden, dtype=torch.bfloat16, device="cuda").mul_(0.02)
        self.second = torch.randn(experts, hidden, width, dtype=torch.bfloat16, device="cuda").mul_(0.02)

    def measure(self, routing: list[torch.Tensor]) -> dict[str, float]:
        x = torch.randn(routing[0].numel(), self.hidden, device="cuda").bfloat16()
        ends = [torch.bincount(r.flatten(), minlength=self.experts).cumsum(0).int().cuda() for r in routing]

        def run() -> None:
            for end in ends:
                gate, up = torch._grouped_mm(x, self.first.transpose(1, 2), offs=end).chunk(2, -1)
                torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.second.transpose(1, 2), offs=end)

        return microseconds(run, len(ends))


class Humming:
    """The same by the grouped kernels of humming-kernels."""

    def __init__(self, bits: int, experts: int, top_k: int, hidden: int, width: int) -> None:
        self.experts, self.hidden = experts, hidden
        self.first = self.projection(bits, 2 * width, hidden)
        self.second = self.projection(bits, hidden, width)

    def projection(self, bits: int, rows: int, cols: int) -> torch.nn.Module:
        from humming.layer import HummingLayer

        layer: torch.nn.Module = HummingLayer(
            shape_n=rows, shape_k=cols, weight_config={"dtype": f"int{bits}", "group_size": GROUP},
            num_experts=self.experts, torch_dtype=torch.bfloat16,
        ).cuda()  # fmt: skip
        layer.load_from_unquantized(
            torch.randn(self.experts, rows, cols, dtype=torch.bfloat16, device="cuda").mul_(0.02)
        )
        layer.transform()
        return layer

    def measure(self, routing: list[torch.Tensor]) -> dict[str, float]:
        x = torch.randn(routing[0].numel(), self.hidden, device="cuda").bfloat16()
        counts = [torch.bincount(r.flatten(), minlength=self.experts).cumsum(0) for r in routing]
        begins = [torch.nn.functional.pad(c, (1, 0)).long().cuda() for c in counts]
        how = {"compute_config": {"gemm_type": "grouped_contiguous"}}

        def run() -> None:
            for begin in begins:
                gate, up = self.first(x, expert_layout=begin, **how).chunk(2, -1)
                self.second(torch.nn.functional.silu(gate) * up, expert_layout=begin, **how)

        return microseconds(run, len(begins))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "few", "many"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    table: list[dict[str, Any]] = []
    for name in arguments.models:
        experts, top_k, hidden, width = MODELS[name]
        grouped = Grouped(experts, top_k, hidden, width)
        routing = {tokens: routings(experts, top_k, tokens) for tokens in arguments.tokens}
        baseline = {tokens: grouped.measure(routing[tokens]) for tokens in arguments.tokens}
        del grouped
        torch.cuda.empty_cache()
        for bits in arguments.bits:
            rival: dict[int, dict[str, float]] = {}
            if find_spec("humming"):
                humming = Humming(bits, experts, top_k, hidden, width)
                rival = {tokens: humming.measure(routing[tokens]) for tokens in arguments.tokens}
                del humming
                torch.cuda.empty_cache()
            ours = Ours(bits, experts, top_k, hidden, width)
            for tokens in arguments.tokens:
                touched = mean(len(r.unique()) for r in routing[tokens])
                row: dict[str, Any] = {"model": name, "format": f"int{bits}-g{GROUP}", "tokens": tokens}
                row |= {"experts_touched": touched}
                row |= by_kernel(arguments.kernels, tokens, partial(ours.measure, routing[tokens]))
                row["bf16_grouped_us"] = baseline[tokens]["median_us"]
                row["speedup"] = row["bf16_grouped_us"] / row["median_us"]
                row["memory_limit_us"] = touched * ours.bytes_of_expert / bandwidth * 1e6
                if rival:
                    row["humming_us"] = rival[tokens]["median_us"]
                table.append(row)
                print(f"{name} int{bits} {tokens:3} tokens: {times(row)} us,", end=" ")
                print(f"bf16 {row['bf16_grouped_us']:7.1f} ({row['speedup']:4.2f}x),", end=" ")
                print(f"Humming {row['humming_us']:7.1f}," if rival else "", end=" ")
                print(f"memory alone {row['memory_limit_us']:6.1f}", flush=True)
            del ours
            torch.cuda.empty_cache()
    if arguments.output:
        device = torch.cuda.get_device_name()
        write_results(arguments.output, "int-experts-gpu", table, device=device, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
