"""Products of int matrices on a GPU, beside cuBLAS in bfloat16, Humming where it is installed, and the
memory's limit.

    python bench/gpu/int_linear.py [--bits 2 3 4 8] [--tokens N ...] [--kernels auto] [--output FILE]

Medians of CUDA graph replays; weights rotate past the second-level cache. `--kernels few many` measures both kernels
instead of the one that a call gets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dequantize import CACHE_BYTES, copy_bandwidth, microseconds, write_results

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor

SHAPES = ((14336, 4096), (8192, 8192), (4096, 4096), (1536, 2048), (2048, 768))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
MOST_OF_FEW = 64  # tokens that the kernel for few is measured with
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

    def measure(self, tokens: int, kernel: str = "auto") -> dict[str, float]:
        nbytes = self.matrix.linear_workspace(tokens, kernel)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        x = torch.randn(tokens, self.cols, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(tokens, self.rows, dtype=torch.bfloat16, device="cuda")

        def call(tiles: torch.Tensor) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            pointers = tiles.data_ptr(), x.data_ptr(), 0, y.data_ptr()
            self.matrix.linear(*pointers, tokens, "bfloat16", stream, workspace.data_ptr(), nbytes, kernel)

        return measure([lambda t=t: call(t) for t in self.copies])  # type: ignore[misc]


def by_kernel(kernels: list[str], tokens: int, run: Callable[[str], dict[str, float]]) -> dict[str, Any]:
    """The fastest kernel's times, and all medians."""
    found = {k: run(k) for k in kernels if k != "few" or len(kernels) == 1 or tokens <= MOST_OF_FEW}
    best = min(found, key=lambda kernel: found[kernel]["median_us"])
    return {"kernel": best, **found[best], **{f"{k}_us": times["median_us"] for k, times in found.items()}}


def times(row: dict[str, Any]) -> str:
    return "/".join(f"{row[key]:.1f}" for key in ("auto_us", "few_us", "many_us") if key in row)


def humming(bits: int, rows: int, cols: int, counts: list[int]) -> dict[int, dict[str, float]]:
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
    found = {}
    for tokens in counts:
        x = torch.randn(tokens, cols, dtype=torch.bfloat16, device="cuda")
        found[tokens] = measure([lambda one=one, x=x: one(x) for one in layers])  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "few", "many"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    table: list[dict[str, Any]] = []
    for rows, cols in SHAPES:
        baseline = {tokens: dense(rows, cols, tokens) for tokens in arguments.tokens}
        for bits in arguments.bits:
            ours = Ours(bits, rows, cols)
            rival = humming(bits, rows, cols, arguments.tokens) if find_spec("humming") else None
            for tokens in arguments.tokens:
                row: dict[str, Any] = {"shape": [rows, cols], "format": f"int{bits}-g{GROUP}", "tokens": tokens}
                row |= by_kernel(arguments.kernels, tokens, partial(ours.measure, tokens))
                row["cublas_bf16_us"] = baseline[tokens]["median_us"]
                row["speedup"] = row["cublas_bf16_us"] / row["median_us"]
                if rival:
                    row["humming_us"] = rival[tokens]["median_us"]
                row["share_of_copy_bandwidth"] = ours.matrix.bytes / row["median_us"] * 1e6 / bandwidth
                table.append(row)
            count = len(arguments.tokens)
            cells = [f"{times(r)} ({r['speedup']:4.2f}x)" for r in table[-count:]]
            share = table[-count]["share_of_copy_bandwidth"]
            print(f"{rows}x{cols} int{bits}: {' '.join(cells)}  {100 * share:.0f} % of copy at 1", flush=True)
            if rival:
                print("    humming", *(f"{rival[tokens]['median_us']:6.1f}" for tokens in arguments.tokens), flush=True)
    if arguments.output:
        device = torch.cuda.get_device_name()
        write_results(arguments.output, "int-linear-gpu", table, device=device, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
