"""Calibrated quantization on a GPU: weights per second from activations to packed records, whole and stage by stage.

    python bench/gpu/gptq_throughput.py [--quick] [--shapes 2048x768 ...] [--output FILE]

Random weights and inputs (mixed, so that columns are correlated as real ones are) on the device. Whole: a stack goes
through in chunks of experts; while one chunk is packed by the CPU, the GPU works on the next. Stages: one chunk, each
stage alone, waiting for the device. A stage's `limit_seconds` is how long the operations and bytes that its algorithm
needs would take at the rates that this device was measured to reach, whichever takes longest.
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
from qmoe_core.quantize.feedback import SPAN, descend, factorize, round_with_feedback, sum_of_squares

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import processor, write_results

SHAPES = ["2048x768", "7168x2048", "6144x2080", "2048x7168", "2080x6144"]  # N x K
FORMATS: dict[str, IntFormat | TernaryFormat] = {"int4-g128": IntFormat(4, 128), "ternary": TernaryFormat("pair")}
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
    """What this device reaches: float32 and bfloat16 matrix products, a copy (bytes read and written), and a copy into
    page-locked memory of the host."""

    def rate(amount: float, run: Callable[[], Any]) -> float:
        return amount / stats.median(timed(run, 5)[0])

    a = torch.randn(4096, 4096, device="cuda")
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    c, d = torch.randn(2, 1 << 29, device="cuda")
    host = torch.empty(1 << 26, pin_memory=True)
    return {
        "float32_flops_per_second": rate(20 * 2 * 4096**3, lambda: [a @ a for _ in range(20)]),
        "bfloat16_flops_per_second": rate(20 * 2 * 8192**3, lambda: [b @ b for _ in range(20)]),
        "copy_bytes_per_second": rate(8.0 * c.numel(), lambda: d.copy_(c)),
        "to_host_bytes_per_second": rate(4.0 * host.numel(), lambda: host.copy_(c[: host.numel()])),
    }


class Stages:
    """Times stages and compares them with the limits of the device."""

    def __init__(self, weights: int, repeats: int, bounds: dict[str, float]) -> None:
        self.weights, self.repeats, self.bounds = weights, repeats, bounds
        self.rows: dict[str, dict[str, float]] = {}

    def __call__(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        flops: float = 0.0,
        tensor_flops: float = 0.0,
        read_written: float = 0.0,
        to_host: float = 0.0,
        times: int = 1,
    ) -> Any:
        """Args: `flops` in float32, `tensor_flops` in bfloat16, bytes on the device and to the host; `times`: how often
        the stage is run for one stack."""
        seconds, result = timed(run, self.repeats)
        median, bounds = stats.median(seconds), self.bounds
        limit = max(
            flops / bounds["float32_flops_per_second"] + tensor_flops / bounds["bfloat16_flops_per_second"],
            read_written / bounds["copy_bytes_per_second"],
            to_host / bounds["to_host_bytes_per_second"],
        )
        self.rows[name] = {
            "seconds": median,
            "least": min(seconds),
            "most": max(seconds),
            "times": times,
            "limit_seconds": limit,
            "float32_flops": flops,
            "bfloat16_flops": tensor_flops,
            "device_bytes": read_written,
            "host_bytes": to_host,
        }
        return result


def stages(
    weight: torch.Tensor, x: torch.Tensor, spec: MethodSpec, repeats: int, bounds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Every stage of one chunk, in the order in which `gptq.quantize_stack` comes to them, and that as a whole."""
    experts, _, columns = weight.shape
    ternary, every = spec.format.name == "ternary", float(weight.numel())
    full, squares = 2.0 * every * columns, float(experts * columns**2)
    # Products with all columns are by spans on tensor cores; within spans, in float32, blocks see those before them.
    spans, within = -(-columns // SPAN), (min(SPAN, columns) - 128) / 2 / columns
    stage = Stages(weight.numel(), repeats, bounds)
    moments = stage(
        "statistics",
        lambda: second_moments(x),
        tensor_flops=2.0 * TOKENS * squares,
        read_written=2.0 * x.numel() + 4 * squares,
    )
    given = StackStatistics(torch.full((experts,), TOKENS), moments)

    def lean() -> StackStatistics:
        gptq._check(weight, given)
        return gptq.lean_on_pooled(given, 0.25)[0]

    shared = stage("check, lean", lean, read_written=4 * every + 8 * squares)
    factors = stage(
        "factorize", lambda: factorize(shared.hessian, 0.01), flops=squares * columns / 3, read_written=12 * squares
    )

    def begin() -> Any:
        grid = gptq.grid_for(weight, shared, factors, spec)
        grid.begin(weight, factors.diagonal)
        return grid

    grid = stage("grids of rows", begin, read_written=12 * 4 * every if ternary else 0.0)
    # A span of columns reads the residuals (three bfloat16 parts) of all columns before it, half of them on average,
    # and its weights, and writes its own residuals, parts and codes.
    codes, residual = stage(
        "feedback",
        lambda: round_with_feedback(weight, factors, grid),
        flops=full / 2 * within,
        tensor_flops=3 * full / 2,
        read_written=every * (6 * spans / 2 + 4 + 11),
    )
    sweeps = int(spec.options["sweeps"])
    if ternary:
        stage(
            "levels",
            lambda: grid.refine(residual, factors.hessian, codes),
            tensor_flops=2 * 2 * full,
            read_written=every * (1 + 4 + 4),
            times=sweeps + 1,
        )
    stage(
        "coordinate descent",
        lambda: descend(weight, factors, grid, codes, residual),
        flops=full * within,
        tensor_flops=3 * full,
        read_written=every * (6 * spans + 4 + 16),
        times=sweeps,
    )
    stage(
        "errors",
        lambda: (
            gptq._output_errors(residual, factors, shared.hessian),
            gptq._output_errors(weight, factors, shared.hessian),
            sum_of_squares(residual).tolist(),
            sum_of_squares(weight).tolist(),
            gptq._zeros(grid, codes),
        ),
        tensor_flops=3 * full * min(1.0, gptq.REPORTED_ROWS / weight.shape[1]),  # by triangles, of a sample of rows
        read_written=every * (2 * 4 + 1),
    )
    stage("to host", lambda: feedback_cuda.to_host(codes), to_host=every)
    results = stage("quantize_stack", lambda: gptq.quantize_stack(weight, given, spec))
    stage("pack", lambda: PackedTensor.pack([matrix for matrix, _ in results]))
    return stage.rows


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


def measure(
    weight: torch.Tensor, x: torch.Tensor, name: str, chunk: int, repeats: int, sweeps: int, bounds: dict[str, float]
) -> dict[str, Any]:
    """One row of the results: a stack (E, N, K) with its activations, to one format."""
    spec = MethodSpec("gptq", FORMATS[name], {"sweeps": sweeps})
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(lambda: whole(weight, x, spec, chunk), repeats)
    peak = torch.cuda.max_memory_allocated() - 4 * weight.numel() - 2 * x.numel()
    rates = [weight.numel() / second for second in seconds]
    torch.cuda.empty_cache()
    parts = stages(weight[:chunk], x[:chunk], spec, repeats, bounds)
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
        "peak_bytes": peak,
        "stages": parts,
    }
    rows, columns = weight.shape[1:]
    print(f"{rows}x{columns} {name}: {stats.median(rates) / 1e6:.0f} M weights/s, all of it; {peak / 2**30:.1f} GiB")
    listed = 0.0
    for stage, part in parts.items():
        share, seconds_in_all = part["limit_seconds"] / part["seconds"], part["seconds"] * part["times"]
        listed += seconds_in_all if stage not in ("statistics", "quantize_stack", "pack") else 0.0
        print(f"    {stage:20} {part['times']:.0f} x {1e3 * part['seconds']:7.1f} ms, {share:4.0%} of the limit")
    print(f"    in stages {1e3 * listed:.1f} ms of {1e3 * parts['quantize_stack']['seconds']:.1f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer experts and repeats")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K")
    parser.add_argument("--sweeps", type=int, default=2)
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else 5
    bounds = limits()
    print({name: f"{value:.3g}" for name, value in bounds.items()})
    torch.cuda.empty_cache()
    rows = []
    for shape in arguments.shapes:
        n, k = map(int, shape.split("x"))
        chunk = 64 if n * k < 1 << 22 else 16
        weight, x = sample(128 if chunk == 64 else 32 if arguments.quick else 64, n, k)
        for name in FORMATS:
            rows.append(measure(weight, x, name, chunk, repeats, arguments.sweeps, bounds))
            if arguments.output:  # again after every row: what is measured stays, whatever comes
                device = f"{torch.cuda.get_device_name()}, {processor()}"
                about = {"sweeps": arguments.sweeps, "torch": torch.__version__, **bounds}
                write_results(arguments.output, "gptq-gpu", rows, device, **about)
        del weight, x
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
