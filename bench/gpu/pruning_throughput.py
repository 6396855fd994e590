"""One-shot pruning on a GPU: weights per second, from activations to masks and updated weights.

    python bench/gpu/pruning_throughput.py [--shapes 2048x768 ...] [--methods sparsegpt ...] [--output FILE]

Random weights and inputs (mixed, so that columns are correlated as real ones are) on the device, in chunks of experts
as `prune` takes them. `statistics_seconds`: the part that second moments of the inputs take.
"""

from __future__ import annotations

import argparse
import statistics as stats
import sys
from pathlib import Path
from typing import Any

import torch
from gptq_throughput import TOKENS, sample, second_moments, timed

from qmoe_core.quantize.base import StackStatistics
from qmoe_core.sparsify import Pattern, PruneSpec, prune_stack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import processor, write_results

SHAPES = ["2048x768", "7168x2048", "2048x7168"]  # N x K
PATTERNS: dict[str, float | None] = {"2:4": None, "unstructured": 0.5}


def given(x: torch.Tensor) -> StackStatistics:
    return StackStatistics(torch.full((len(x),), TOKENS), second_moments(x))


def whole(weight: torch.Tensor, x: torch.Tensor, spec: PruneSpec, chunk: int) -> None:
    """Statistics and pruning of a stack, chunk by chunk."""
    for first in range(0, len(weight), chunk):
        prune_stack(weight[first : first + chunk], spec, given(x[first : first + chunk]))


def measure(weight: torch.Tensor, x: torch.Tensor, spec: PruneSpec, chunk: int, repeats: int) -> dict[str, Any]:
    """One row of the results: a stack (E, N, K) with its activations, by one method."""
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(lambda: whole(weight, x, spec, chunk), repeats)
    peak = torch.cuda.max_memory_allocated() - 4 * weight.numel() - 2 * x.numel()
    torch.cuda.empty_cache()
    alone, _ = timed(lambda: [given(x[first : first + chunk]) for first in range(0, len(x), chunk)], repeats)
    rates = [weight.numel() / second for second in seconds]
    return {
        "shape": list(weight.shape[1:]),
        "experts": len(weight),
        "chunk": chunk,
        "tokens": TOKENS,
        "method": spec.method,
        "pattern": str(spec.pattern),
        "weights_per_second": stats.median(rates),
        "least": min(rates),
        "most": max(rates),
        "statistics_seconds": stats.median(alone),
        "seconds": stats.median(seconds),
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "alps"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        n, k = map(int, shape.split("x"))
        chunk = 64 if n * k < 1 << 22 else 16
        weight, x = sample(chunk * 2, n, k)
        for method in arguments.methods:
            for pattern, sparsity in PATTERNS.items():
                spec = PruneSpec(method, Pattern.parse(pattern), sparsity)
                rows.append(measure(weight, x, spec, chunk, arguments.repeats if method != "alps" else 1))
                print(f"{shape} {method} {pattern}: {rows[-1]['weights_per_second'] / 1e6:.0f} M weights/s", flush=True)
                if arguments.output:  # again after every row: what is measured stays, whatever comes
                    device = f"{torch.cuda.get_device_name()}, {processor()}"
                    write_results(arguments.output, "pruning-throughput", rows, device, torch=torch.__version__)
        del weight, x
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
