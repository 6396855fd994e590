"""Products of ternary matrices on a GPU, below one bit per weight: linear layers beside cuBLAS in bfloat16 and `int2`,
and whole layers of experts beside bfloat16 grouped products.

    python bench/gpu/ternary.py [--zeros 0.8 0.885 0.95] [--models NAME ...] [--qmoe FOLDER] [--output FILE]

Trits are random. Medians of CUDA graph replays; weights rotate past the second-level cache. Routing as in
int_experts.py. `--kernels few many` measures both kernels instead of the one that a call gets. `--qmoe`: a checkout of
IST-DASLab/qmoe, whose kernel is then compiled and measured as well, at its shapes, by CUDA events (it takes no stream).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, copy_bandwidth, microseconds, write_results
from int_experts import MODELS, Grouped, routings
from int_linear import Ours as Int
from int_linear import by_kernel, dense, measure, times

from qmoe_core import _C, PackedTensor, TernaryFormat, TernaryMatrix

SHAPES = ((14336, 4096), (4096, 14336), (6144, 2080), (2080, 6144))
QMOE_SHAPES = ((6144, 2080), (2080, 6144))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
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


def linear(stack: Stack, rows: int, cols: int, tokens: int, kernel: str) -> dict[str, float]:
    x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(stack.matrix.linear_workspace(tokens, kernel), dtype=torch.uint8, device="cuda")

    def call(streams: torch.Tensor) -> None:
        stack.matrix.linear(
            streams.data_ptr(), x.data_ptr(), 0, y.data_ptr(), tokens, "bfloat16", stream(), workspace.data_ptr(),
            workspace.numel(), kernel,
        )  # fmt: skip

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
        self.layers = {
            kernel: _C.CudaTernaryExperts(self.first.matrix, self.second.matrix, "silu", kernel=kernel)
            for kernel in ("auto", "few", "many")
        }
        self.hidden, self.top_k = hidden, top_k
        self.bytes_of_expert = (self.first.matrix.bytes + self.second.matrix.bytes) / experts
        self.bits = 8 * self.bytes_of_expert / (3 * hidden * width)

    def measure(self, routing: list[torch.Tensor], kernel: str) -> dict[str, float]:
        layer = self.layers[kernel]
        tokens, copies = len(routing[0]), len(self.first.streams)
        x = torch.randn(tokens, self.hidden, device="cuda").bfloat16()
        y = torch.empty_like(x)
        ids = [r.cuda() for r in routing]
        weights = torch.rand(tokens, self.top_k, device="cuda")
        workspace = torch.empty(layer.workspace(tokens, self.top_k), dtype=torch.uint8, device="cuda")

        def run() -> None:
            for i, own in enumerate(ids):
                layer.run(
                    self.first.streams[i % copies].data_ptr(), self.second.streams[i % copies].data_ptr(), 0, 0,
                    x.data_ptr(), "bfloat16", tokens, own.data_ptr(), weights.data_ptr(), "float32", self.top_k,
                    y.data_ptr(), workspace.data_ptr(), workspace.numel(), stream(),
                )  # fmt: skip

        return microseconds(run, len(ids))


def qmoe(folder: Path, zeros: float, rows: int, cols: int) -> dict[str, float]:
    """QMoE's own kernel: microseconds for a token, and bits per weight."""
    if "sub1" not in sys.modules:
        from torch.utils.cpp_extension import load

        sources = [str(folder / name) for name in ("sub1_cuda.cpp", "sub1_cuda_kernel.cu")]
        sys.modules["sub1_cuda"] = load("sub1_cuda", sources)
        sys.path.insert(0, str(folder))
    sub1 = __import__("sub1")
    drawn = torch.rand(rows, cols, device="cuda")
    weight = (drawn < (1 - zeros) / 2).bfloat16() - (drawn > 1 - (1 - zeros) / 2).bfloat16()
    first = sub1.Sub1Linear.make(weight)
    bits = (16 * first.w_comp.numel() + 64 * rows) / weight.numel()
    packed = [first.w_comp, *(first.w_comp.clone() for _ in range(CACHE_BYTES // first.w_comp.nbytes + 1))]
    x = torch.randn(cols, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(rows, dtype=torch.bfloat16, device="cuda")
    table, matvec = sub1.DEC[0], sys.modules["sub1_cuda"].sub1matvec

    def run() -> None:
        for w_comp in packed:
            matvec(table, w_comp, first.row_off, first.ter_minmax, x, y)

    return {"qmoe_us": by_events(run, len(packed)), "qmoe_bits": bits}


def by_events(run: Callable[[], None], calls: int) -> float:
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return float(np.median(times[2:]))


def linears(densities: list[float], kernels: list[str], rival: Path | None) -> list[dict[str, Any]]:
    table = []
    for rows, cols in SHAPES:
        baseline = {tokens: dense(rows, cols, tokens)["median_us"] for tokens in TOKENS}
        int2 = Int(2, rows, cols) if cols % 128 == 0 else None
        others = {n: int2.measure(n)["median_us"] if int2 and n <= 16 else None for n in TOKENS}
        del int2
        for zeros in densities:
            stack = Stack(sample(zeros, rows, cols))
            decoded = unpack(stack, rows, cols)["median_us"]
            for tokens in TOKENS:
                row: dict[str, Any] = {"shape": [rows, cols], "zeros": zeros, "tokens": tokens, "bits": stack.bits}
                row |= {"stored_bits": stack.stored_bits, **stack.matrix.shape}
                row |= by_kernel(kernels, tokens, partial(linear, stack, rows, cols, tokens))
                if rival is not None and tokens == 1 and (rows, cols) in QMOE_SHAPES:
                    row |= qmoe(rival, zeros, rows, cols)
                row |= {"cublas_bf16_us": baseline[tokens], "speedup": baseline[tokens] / row["median_us"]}
                row |= {"int2_us": others[tokens], "unpack_us": decoded, "weights": rows * cols}
                table.append(row)
            cells = [f"{times(r)} ({r['speedup']:4.2f}x)" for r in table[-len(TOKENS) :]]
            print(f"{rows}x{cols} {zeros}: {stack.bits:.3f} bits, {' '.join(cells)}", end=" ")
            print(f"int2 {others[1] or 0:.1f}, unpack {rows * cols / decoded / 1e3:.0f} G/s", end=" ")
            print({k: round(v, 2) for k, v in table[-len(TOKENS)].items() if k.startswith("qmoe")}, flush=True)
    return table


def layers(names: list[str], densities: list[float], counts: list[int], kernels: list[str]) -> list[dict[str, Any]]:
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
                row |= by_kernel(kernels, tokens, partial(layer.measure, routing[tokens]))
                row |= {"bf16_grouped_us": baseline[tokens], "speedup": baseline[tokens] / row["median_us"]}
                touched = mean(len(r.unique()) for r in routing[tokens])
                row |= {"experts_touched": touched, "bytes": touched * layer.bytes_of_expert}
                table.append(row)
                print(f"{name} {zeros} {tokens:4} tokens: {times(row)} us,", end=" ")
                print(f"bf16 {baseline[tokens]:7.1f} ({row['speedup']:4.2f}x)", flush=True)
            del layer
            torch.cuda.empty_cache()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.885, 0.95])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], help="of layers")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "few", "many"])
    parser.add_argument("--qmoe", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    rows = linears(arguments.zeros, arguments.kernels, arguments.qmoe)
    of_layers = layers(arguments.models, arguments.zeros, arguments.tokens, arguments.kernels)
    if arguments.output:
        device = torch.cuda.get_device_name()
        about = {"copy_bytes_per_second": bandwidth, "layers": of_layers}
        write_results(arguments.output, "ternary-gpu", rows, device=device, **about)


if __name__ == "__main__":
    main()
