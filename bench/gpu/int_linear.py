"""Products of int matrices and few tokens on a GPU, beside cuBLAS in bfloat16, Humming where it is installed, and the
memory's limit.

    python bench/gpu/int_linear.py [--output FILE]

Medians of CUDA graph replays; weights rotate past the second-level cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, copy_bandwidth, microseconds, write_results

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor

SHAPES = ((14336, 4096), (8192, 8192), (4096, 4096), (1536, 2048), (2048, 768))
TOKENS = (1, 2, 4, 8, 16)
GROUP = 128


def sample(bits: int, rows: int, cols: int) -> PackedTensor:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (rows, cols), np.uint8)
    scales = (rng.random((rows, cols // GROUP)) / 64).astype(np.float16).astype(np.float32)
    return PackedTensor.pack([IntMatrix(IntFormat(bits, GROUP, False), codes, scales, None)])


def measure(calls: list[Callable[[], None]]) -> dict[str, float]:
    """Microseconds of a call, over graphs that make all calls one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return microseconds(run, len(calls))


def dense(rows: int, cols: int, tokens: int) -> dict[str, float]:
    copies = max(2, -(-CACHE_BYTES // (2 * rows * cols)))
    weights = [torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
    return measure([lambda w=w: torch.mm(x, w.T, out=y) for w in weights])  # type: ignore[misc]


class Ours:
    def __init__(self, bits: int, rows: int, cols: int) -> None:
        packed = sample(bits, rows, cols)
        self.matrix, self.rows, self.cols = _C.CudaInt(packed.data), rows, cols
        record, stream = torch.from_numpy(packed.data).cuda(), torch.cuda.current_stream().cuda_stream
        first = torch.empty(self.matrix.bytes, dtype=torch.uint8, device="cuda")
        self.matrix.prepack(record.data_ptr(), first.data_ptr(), first.numel(), stream)
        copies = max(2, -(-CACHE_BYTES // self.matrix.bytes))
        self.copies = [first, *(first.clone() for _ in range(copies - 1))]

    def measure(self, tokens: int) -> dict[str, float]:
        x = torch.randn(tokens, self.cols, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(tokens, self.rows, dtype=torch.bfloat16, device="cuda")

        def call(tiles: torch.Tensor) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            pointers = tiles.data_ptr(), x.data_ptr(), 0, y.data_ptr()
            self.matrix.linear(*pointers, tokens, "bfloat16", stream)

        return measure([lambda t=t: call(t) for t in self.copies])  # type: ignore[misc]


def humming(bits: int, rows: int, cols: int) -> dict[int, dict[str, float]]:
    """Of the same product by the kernels of humming-kernels, for each number of tokens."""
    from humming.layer import HummingLayer

    layers = []
    for _ in range(max(2, -(-CACHE_BYTES * 8 // (bits * rows * cols)))):
        layer = HummingLayer(
            shape_n=rows, shape_k=cols, weight_config={"dtype": f"int{bits}", "group_size": GROUP},
            torch_dtype=torch.bfloat16,
        ).cuda()  # fmt: skip
        layer.load_from_unquantized(torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda"))
        layer.transform()
        layers.append(layer)
    times = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
        times[tokens] = measure([lambda one=one, x=x: one(x) for one in layers])  # type: ignore[misc]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    table: list[dict[str, Any]] = []
    for rows, cols in SHAPES:
        baseline = {tokens: dense(rows, cols, tokens) for tokens in TOKENS}
        for bits in (2, 3, 4, 8):
            ours = Ours(bits, rows, cols)
            rival = humming(bits, rows, cols) if find_spec("humming") else None
            for tokens in TOKENS:
                row: dict[str, Any] = {"shape": [rows, cols], "format": f"int{bits}-g{GROUP}", "tokens": tokens}
                row |= ours.measure(tokens)
                row["cublas_bf16_us"] = baseline[tokens]["median_us"]
                row["speedup"] = row["cublas_bf16_us"] / row["median_us"]
                if rival:
                    row["humming_us"] = rival[tokens]["median_us"]
                row["share_of_copy_bandwidth"] = ours.matrix.bytes / row["median_us"] * 1e6 / bandwidth
                table.append(row)
            cells = [f"{r['median_us']:6.1f} ({r['speedup']:4.2f}x)" for r in table[-len(TOKENS) :]]
            share = table[-len(TOKENS)]["share_of_copy_bandwidth"]
            print(f"{rows}x{cols} int{bits}: {' '.join(cells)}  {100 * share:.0f} % of copy at 1", flush=True)
            if rival:
                print("    humming", *(f"{rival[tokens]['median_us']:6.1f}" for tokens in TOKENS), flush=True)
    if arguments.output:
        device = torch.cuda.get_device_name()
        write_results(arguments.output, "int-linear-gpu", table, device=device, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
