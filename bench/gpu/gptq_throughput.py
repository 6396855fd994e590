"""Calibrated quantization on a GPU: weights per second from activations to packed records, whole and stage by stage.

    python bench/gpu/gptq_throughput.py [--quick] [--output FILE]

Random weights and inputs (mixed, so that columns are correlated as real ones are) on the device. Whole: a stack goes
through in chunks of experts; while one chunk is packed by the CPU, the GPU works on the next. Stages: one chunk, each
stage alone, the GPU's by events.
"""

from __future__ import annotations

import argparse
import statistics as stats
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qmoe_core import IntFormat, PackedTensor, TernaryFormat
from qmoe_core.quantize import feedback_cuda, gptq
from qmoe_core.quantize.base import MethodSpec, StackStatistics
from qmoe_core.quantize.feedback import descend, factorize, output_error, round_with_feedback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

SHAPES = [(2048, 768), (7168, 2048), (6144, 2080)]  # (N, K)
FORMATS = {"int4-g128": IntFormat(4, 128), "ternary": TernaryFormat("pair")}
TOKENS = 4096


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """(E, T, K) bfloat16 -> (E, K, K) float32: products of bfloat16 are exact, sums are float32."""
    return torch.bmm(x.transpose(1, 2), x, out_dtype=torch.float32)


def sample(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (E, N, K) float32 and activations (E, T, K) bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(rows)
    weight = 0.02 * torch.randn(experts, rows, columns, device="cuda", generator=generator)
    mixing = torch.randn(columns, columns, device="cuda", generator=generator) / columns**0.5
    mixing += torch.eye(columns, device="cuda")
    x = torch.empty(experts, TOKENS, columns, device="cuda", dtype=torch.bfloat16)
    for expert in range(experts):
        x[expert] = torch.randn(TOKENS, columns, device="cuda", generator=generator) @ mixing
    return weight, x


def timed(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each repeat after one warm-up, waiting for the device, and the last result."""
    result = run()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, result


def limits() -> dict[str, float]:
    """What this device reaches: float32 and bfloat16 matrix products, and a copy (bytes read and written)."""

    def rate(amount: float, run: Callable[[], Any]) -> float:
        return amount / stats.median(timed(run, 5)[0])

    a = torch.randn(4096, 4096, device="cuda")
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    c, d = torch.randn(2, 1 << 29, device="cuda")
    return {
        "float32_flops_per_second": rate(20 * 2 * 4096**3, lambda: [a @ a for _ in range(20)]),
        "bfloat16_flops_per_second": rate(20 * 2 * 8192**3, lambda: [b @ b for _ in range(20)]),
        "copy_bytes_per_second": rate(8.0 * c.numel(), lambda: d.copy_(c)),
    }


def stages(weight: torch.Tensor, x: torch.Tensor, spec: MethodSpec, repeats: int) -> dict[str, dict[str, float]]:
    """Median and range of the seconds of every stage for one chunk, with its share of the limit it is closest to."""
    experts, rows, columns = weight.shape
    out: dict[str, dict[str, float]] = {}

    def stage(name: str, run: Callable[[], Any], flops: float = 0.0) -> Any:
        seconds, result = timed(run, repeats)
        median = stats.median(seconds)
        out[name] = {
            "seconds": median,
            "least": min(seconds),
            "most": max(seconds),
            "weights_per_second": weight.numel() / median,
            "flops_per_second": flops / median,
        }
        return result

    given = StackStatistics(
        torch.full((experts,), TOKENS),
        stage("statistics", lambda: second_moments(x), 2.0 * TOKENS * columns**2 * experts),
    )
    shared, _ = gptq.lean_on_pooled(given, 0.25)
    factors = stage("factorize", lambda: factorize(shared.hessian, 0.01), experts * columns**3 / 3)

    def begin() -> Any:
        grid = gptq._grid(weight, shared, factors, spec)
        grid.begin(weight, factors.diagonal)
        return grid

    grid = stage("grids of rows", begin)
    full = 2.0 * weight.numel() * columns
    codes, residual = stage("feedback", lambda: round_with_feedback(weight, factors, grid), full / 2)

    def sweep() -> None:
        grid.refine(residual, factors.hessian, codes)
        descend(weight, factors, grid, codes, residual)

    stage("one sweep", sweep, full * (3 if spec.format.name == "ternary" else 1))
    stage("errors", lambda: (output_error(residual, shared.hessian), output_error(weight, shared.hessian)), 2 * full)
    target = torch.zeros((experts, rows, 128), device="cuda")
    inner = [slice(0, 128)] * 8
    stage(
        "inner kernel",
        lambda: [
            feedback_cuda.round_block(
                weight, target, factors.unit_upper[:, b, b], factors.diagonal[:, b], grid, b, codes, residual
            )
            for b in inner
        ],
        weight.numel() / columns * 128 * 128 * 8,
    )
    results = stage("quantize_stack", lambda: gptq.quantize_stack(weight, given, spec))
    stage("pack", lambda: PackedTensor.pack([matrix for matrix, _ in results]))
    return out


def whole(weight: torch.Tensor, x: torch.Tensor, spec: MethodSpec, chunk: int) -> None:
    """The pipeline over a stack of experts; packing of a chunk overlaps with the GPU's work on the next."""
    experts = weight.shape[0]
    with ThreadPoolExecutor(1) as packer:
        packed = []
        for first in range(0, experts, chunk):
            part = slice(first, first + chunk)
            given = StackStatistics(torch.full((len(weight[part]),), TOKENS), second_moments(x[part]))
            results = gptq.quantize_stack(weight[part], given, spec)
            packed.append(packer.submit(PackedTensor.pack, [matrix for matrix, _ in results]))
        for future in packed:
            future.result()


def measure(weight: torch.Tensor, x: torch.Tensor, name: str, chunk: int, repeats: int, sweeps: int) -> dict[str, Any]:
    """One row of the results: a stack (E, N, K) with its activations, to one format."""
    spec = MethodSpec("gptq", FORMATS[name], {"sweeps": sweeps})
    seconds, _ = timed(lambda: whole(weight, x, spec, chunk), repeats)
    rates = [weight.numel() / second for second in seconds]
    torch.cuda.empty_cache()
    parts = stages(weight[:chunk], x[:chunk], spec, repeats)
    torch.cuda.empty_cache()
    row = {
        "shape": list(weight.shape[1:]),
        "experts": len(weight),
        "chunk": chunk,
        "tokens": TOKENS,
        "format": name,
        "weights_per_second": stats.median(rates),
        "least": min(rates),
        "most": max(rates),
        "stages": parts,
    }
    print(f"{weight.shape[1]}x{weight.shape[2]} {name}: {stats.median(rates) / 1e6:.0f} M weights/s, all of it")
    for stage, part in parts.items():
        print(
            f"    {stage:16} {1e3 * part['seconds']:8.1f} ms {part['weights_per_second'] / 1e6:8.0f} M weights/s"
            f" {part['flops_per_second'] / 1e12:7.1f} TFLOP/s"
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer experts and repeats")
    parser.add_argument("--sweeps", type=int, default=2)
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else 5
    bounds = limits()
    print({name: f"{value:.3g}" for name, value in bounds.items()})
    torch.cuda.empty_cache()
    rows = []
    for shape in SHAPES:
        chunk = 64 if shape[1] < 1024 else 16
        weight, x = sample(2 * chunk if arguments.quick or chunk == 64 else 64, *shape)
        rows += [measure(weight, x, name, chunk, repeats, arguments.sweeps) for name in FORMATS]
        del weight, x
        torch.cuda.empty_cache()
    if arguments.output:
        write_results(
            arguments.output, "gptq-gpu", rows, device=torch.cuda.get_device_name(), sweeps=arguments.sweeps, **bounds
        )


if __name__ == "__main__":
    main()
