"""Products of ternary matrices on a GPU, below one bit per weight: linear layers beside cuBLAS in bfloat16 and `int2`,
and whole layers of experts beside bfloat16 grouped products.

    python bench/gpu/ternary.py [--zeros 0.8 0.885 0.95] [--models NAME ...] [--output FILE]

Trits are random. Medians of CUDA graph replays; weights rotate past the second-level cache. Routing as in
int_experts.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, copy_bandwidth, microseconds, write_results
from int_experts import MODELS, Grouped, routings
from int_linear import Ours as Int
from int_linear import dense, measure

from qmoe_core import _C, PackedTensor, TernaryFormat, TernaryMatrix

SHAPES = ((14336, 4096), (4096, 14336), (6144, 2080), (2080, 6144))
TOKENS = (1, 2, 4, 8, 16)
THREADS = len(os.sched_getaffinity(0))


def sample(zeros: float, rows: int, cols: int, experts: int = 1) -> PackedTensor:
    """`experts` times the same matrix: what is in them does not matter, and making them takes long."""
    rng = np.random.default_rng(rows)
    drawn, share = rng.random((rows, cols), np.float32), (1 - zeros) / 2
    trits = (drawn < share).astype(np.int8) - (drawn > 1 - share).astype(np.int8)
    levels = rng.integers(64, 128, (rows, 2)) / 64 * [-1, 1] * 2.0 ** -round(np.log2(max(cols * share, 1)) / 2)
    return PackedTensor.pack([TernaryMatrix(TernaryFormat("pair"), trits, levels.astype(np.float32))] * experts)


class Stack:
    """On the device, several times where one would fit into the cache."""

    def __init__(self, packed: PackedTensor, order: str = "plain", copies: int = 0) -> None:
        self.matrix = _C.CudaTernary(packed.data, order, THREADS)
        weights = packed.experts * packed.rows * packed.cols
        self.bits, self.stored_bits = 8 * self.matrix.bytes / weights, packed.bits_per_weight
        copies = copies or max(2, -(-CACHE_BYTES // self.matrix.bytes))
        first = torch.from_numpy(self.matrix.take()).cuda()
        self.streams = [first, *(first.clone() for _ in range(copies - 1))]


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def linear(stack: Stack, rows: int, cols: int, tokens: int) -> dict[str, float]:
    x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")

    def call(streams: torch.Tensor) -> None:
        stack.matrix.linear(streams.data_ptr(), x.data_ptr(), 0, y.data_ptr(), tokens, "bfloat16", stream())

    return measure([lambda s=s: call(s) for s in stack.streams])  # type: ignore[misc]


def unpack(stack: Stack, rows: int, cols: int) -> dict[str, float]:
    out = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda")

    def call(streams: torch.Tensor) -> None:
        stack.matrix.unpack(streams.data_ptr(), 0, out.data_ptr(), "bfloat16", stream())

    return measure([lambda s=s: call(s) for s in stack.streams])  # type: ignore[misc]


class Layer:
    def __init__(self, zeros: float, experts: int, top_k: int, hidden: int, width: int) -> None:
        copies = max(1, -(-CACHE_BYTES * 8 // (experts * hidden * width * 3)))
        self.first = Stack(sample(zeros, 2 * width, hidden, experts), "halves", copies)
        self.second = Stack(sample(zeros, hidden, width, experts), "plain", copies)
        self.layer = _C.CudaTernaryExperts(self.first.matrix, self.second.matrix, "silu")
        self.hidden, self.top_k = hidden, top_k
        self.bytes_of_expert = (self.first.matrix.bytes + self.second.matrix.bytes) / experts
        self.bits = 8 * self.bytes_of_expert / (3 * hidden * width)

    def measure(self, routing: list[torch.Tensor]) -> dict[str, float]:
        tokens, copies = len(routing[0]), len(self.first.streams)
        x = torch.randn(tokens, self.hidden, device="cuda").bfloat16()
        y = torch.empty_like(x)
        ids = [r.cuda() for r in routing]
        weights = torch.rand(tokens, self.top_k, device="cuda")
        workspace = torch.empty(self.layer.workspace(tokens, self.top_k), dtype=torch.uint8, device="cuda")

        def run() -> None:
            for i, own in enumerate(ids):
                self.layer.run(
                    self.first.streams[i % copies].data_ptr(), self.second.streams[i % copies].data_ptr(), 0, 0,
                    x.data_ptr(), "bfloat16", tokens, own.data_ptr(), weights.data_ptr(), "float32", self.top_k,
                    y.data_ptr(), workspace.data_ptr(), workspace.numel(), stream(),
                )  # fmt: skip

        return microseconds(run, len(ids))


def linears(densities: list[float]) -> list[dict[str, Any]]:
    table = []
    for rows, cols in SHAPES:
        baseline = {tokens: dense(rows, cols, tokens)["median_us"] for tokens in TOKENS}
        int2 = Int(2, rows, cols) if cols % 128 == 0 else None
        others = {tokens: int2.measure(tokens)["median_us"] if int2 else None for tokens in TOKENS}
        del int2
        for zeros in densities:
            stack = Stack(sample(zeros, rows, cols))
            decoded = unpack(stack, rows, cols)["median_us"]
            for tokens in TOKENS:
                row: dict[str, Any] = {"shape": [rows, cols], "zeros": zeros, "tokens": tokens, "bits": stack.bits}
                row |= {"stored_bits": stack.stored_bits, **stack.matrix.shape, **linear(stack, rows, cols, tokens)}
                row |= {"cublas_bf16_us": baseline[tokens], "speedup": baseline[tokens] / row["median_us"]}
                row |= {"int2_us": others[tokens], "unpack_us": decoded, "weights": rows * cols}
                table.append(row)
            cells = [f"{r['median_us']:6.1f} ({r['speedup']:4.2f}x)" for r in table[-len(TOKENS) :]]
            print(f"{rows}x{cols} {zeros}: {stack.bits:.3f} bits, {' '.join(cells)}", end=" ")
            print(f"int2 {others[1] or 0:.1f}, unpack {rows * cols / decoded / 1e3:.0f} G/s", flush=True)
    return table


def layers(names: list[str], densities: list[float], counts: list[int]) -> list[dict[str, Any]]:
    table = []
    for name in names:
        experts, top_k, hidden, width = MODELS[name]
        grouped = Grouped(experts, top_k, hidden, width)
        routing = {tokens: routings(experts, top_k, tokens) for tokens in counts}
        baseline = {tokens: grouped.measure(routing[tokens])["median_us"] for tokens in counts}
        del grouped
        torch.cuda.empty_cache()
        for zeros in densities:
            layer = Layer(zeros, experts, top_k, hidden, width)
            for tokens in counts:
                row: dict[str, Any] = {"model": name, "zeros": zeros, "tokens": tokens, "bits": layer.bits}
                row |= layer.measure(routing[tokens])
                row |= {"bf16_grouped_us": baseline[tokens], "speedup": baseline[tokens] / row["median_us"]}
                touched = mean(len(r.unique()) for r in routing[tokens])
                row |= {"experts_touched": touched, "bytes": touched * layer.bytes_of_expert}
                table.append(row)
                print(f"{name} {zeros} {tokens:3} tokens: {row['median_us']:7.1f} us,", end=" ")
                print(f"bf16 {baseline[tokens]:7.1f} ({row['speedup']:4.2f}x)", flush=True)
            del layer
            torch.cuda.empty_cache()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.885, 0.95])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64], help="of layers")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    rows = linears(arguments.zeros)
    of_layers = layers(arguments.models, arguments.zeros, arguments.tokens)
    if arguments.output:
        device = torch.cuda.get_device_name()
        about = {"copy_bytes_per_second": bandwidth, "layers": of_layers}
        write_results(arguments.output, "ternary-gpu", rows, device=device, **about)


if __name__ == "__main__":
    main()
