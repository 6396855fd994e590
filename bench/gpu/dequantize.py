"""Decoding of packed matrices on the GPU: weights per second and share of the measured copy bandwidth.

    python bench/gpu/dequantize.py --output bench/results/dequantize-gpu.json

Every matrix is decoded to bfloat16 inside a CUDA graph that rotates over copies larger together than the second-level
cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

SHAPES = [(6144, 2080), (14336, 4096)]
CACHE_BYTES = 200 << 20  # rotate over at least this much: four times the second-level cache of an H100


def graph_seconds(run: Callable[[], None], repeats: int = 30) -> list[float]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[3:]


def microseconds(run: Callable[[], None], count: int) -> dict[str, float]:
    """Of one of `count` calls that `run` makes: median, and where the fastest and slowest tenths end."""
    times = sorted(t / count * 1e6 for t in graph_seconds(run))
    return {
        "median_us": statistics.median(times),
        "p10_us": times[len(times) // 10],
        "p90_us": times[9 * len(times) // 10],
    }


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a device-to-device copy of 1 GiB, outside of a graph: a graph's copies were
    measured to be slower by a fifth."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times[10:])  # clocks go up before


def samples(rows: int, cols: int) -> dict[str, PackedTensor]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    packed = {}
    for bits in (2, 4):
        codes, scales, zeros = _C.rtn_int(weight, bits, 128, True, "float16")
        packed[f"int{bits}-g128"] = PackedTensor.pack([IntMatrix(IntFormat(bits), codes, scales, zeros)])
    for zero_share in (0.80, 0.885, 0.95):
        p = [(1 - zero_share) / 2, zero_share, (1 - zero_share) / 2]
        trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, cols), p=p)
        levels = np.ones((rows, 1), np.float32)
        packed[f"ternary-{zero_share}"] = PackedTensor.pack([TernaryMatrix(TernaryFormat("symmetric"), trits, levels)])
    return packed


def measure(packed: PackedTensor, bandwidth: float) -> dict[str, Any]:
    weights = packed.rows * packed.cols
    copies = max(2, -(-CACHE_BYTES // (packed.nbytes + 2 * weights)))
    on_device = [torch.from_numpy(packed.data).cuda() for _ in range(copies)]
    outputs = [torch.empty(weights, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    record, table = _C.CudaRecord(packed.data), None
    if packed.info["specs"][0]["format"] == "ternary":
        table = torch.from_numpy(record.table(0).view(np.int32)).cuda()

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for source, out in zip(on_device, outputs, strict=True):
            pointer = 0 if table is None else table.data_ptr()
            record.dequantize(0, source.data_ptr(), pointer, out.data_ptr(), "bfloat16", stream)

    times = microseconds(run, copies)
    median = times["median_us"] / 1e6
    moved = packed.nbytes + 2 * weights
    return {
        **times,
        "weights_per_second": weights / median,
        "share_of_copy_bandwidth": moved / median / bandwidth,
        "bits_per_weight": packed.bits_per_weight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = []
    for shape in SHAPES:
        for name, packed in samples(*shape).items():
            row = {"shape": list(shape), "format": name, **measure(packed, bandwidth)}
            rows.append(row)
            print(
                f"{shape[0]}x{shape[1]} {name:14} {row['median_us']:8.1f} us "
                f"{row['weights_per_second'] / 1e9:7.0f} G weights/s "
                f"{100 * row['share_of_copy_bandwidth']:4.0f} % of copy"
            )
    if arguments.output:
        write_results(
            arguments.output,
            "dequantize-gpu",
            rows,
            device=torch.cuda.get_device_name(),
            copy_bytes_per_second=bandwidth,
        )


if __name__ == "__main__":
    main()
