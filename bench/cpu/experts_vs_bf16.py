"""One token through a layer of experts: packed weights against PyTorch's bf16 linear over the same experts.

At batch 1 a layer reads each chosen expert's weights once and does nothing else of size, so this is a race to read
memory. To keep it one, the chosen experts rotate: each step takes the next `top_k` of a random order of all experts, so
that a weight comes back only after all others were read. All contestants run in turn within each step,
on the same experts.

Contestants:
  packed         qmoe::grouped_linear, gate and up in one call, then down; SwiGLU between; bf16 activations
  bf16_linear    F.linear in bf16 for each chosen expert: what the packed layer must not be slower than
  fp32_linear    the same in float32 (only with --fp32: it needs twice the memory of bf16)
  packed_module  PackedExperts.forward: sorting, routing weights and summing included
  bf16_module    the Qwen3-MoE experts module of transformers in bf16, "eager", on the same choices

Shapes default to the experts of Qwen3-30B-A3B. Example:

    python bench/cpu/experts_vs_bf16.py --threads 1 2 --output bench/results/experts-vs-bf16.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qmoe_core import _C
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor
from qmoe_core.runtime.experts import PackedExperts
from qmoe_core.runtime.ops import grouped_linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results


def random_stack(experts: int, rows: int, cols: int, bits: int, group: int) -> PackedTensor:
    """Random codes: the time does not depend on the values, and quantizing real weights would take longer than the
    race."""
    generator = np.random.default_rng(0)
    fmt = IntFormat(bits, group)
    groups = -(-cols // group) if group else 1
    matrices = []
    for _ in range(experts):
        codes = generator.integers(0, 2**bits, (rows, cols), dtype=np.uint8)
        scales = generator.uniform(0.5, 1.5, (rows, groups)).astype(np.float16).astype(np.float32) / 256
        zeros = generator.integers(0, 2**bits, (rows, groups), dtype=np.uint8)
        matrices.append(IntMatrix(fmt, codes, scales, zeros))
    return PackedTensor.pack(matrices)


def read_limit(threads: int) -> float:
    """GB/s of a plain sum over 512 MiB: what this machine reads at this moment, for scale."""
    torch.set_num_threads(threads)
    data = torch.ones(128 << 20)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.numel() * 4 / min(times) / 1e9


def summary(seconds: list[float], weights: int, nbytes: float) -> dict[str, float]:
    quarters = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return {
        "median_ms": round(median * 1e3, 4),
        "quartiles_ms": [round(quarters[0] * 1e3, 4), round(quarters[2] * 1e3, 4)],
        "min_ms": round(min(seconds) * 1e3, 4),
        "weights_per_second": round(weights / median / 1e9, 3) * 1e9,
        "gigabytes_per_second": round(nbytes / median / 1e9, 2),
    }


def contestants(args: argparse.Namespace) -> tuple[dict[str, Callable[[torch.Tensor], torch.Tensor]], dict[str, float]]:
    """The functions from chosen expert ids (top_k,) to an output, and each one's stored bytes per step."""
    hidden, inner, experts, top_k = args.hidden, args.intermediate, args.experts, args.top_k
    up_record = random_stack(experts, 2 * inner, hidden, args.bits, args.group)
    down_record = random_stack(experts, hidden, inner, args.bits, args.group)
    up, down = torch.from_numpy(up_record.data), torch.from_numpy(down_record.data)

    config = AutoConfig.for_model("qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        dense = Qwen3MoeExperts(config)
    dense = dense.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for expert in range(experts):  # the same weights on both sides
            dense.gate_up_proj[expert] = torch.from_numpy(up_record.decode(expert))
            dense.down_proj[expert] = torch.from_numpy(down_record.decode(expert))
    module = PackedExperts.from_packed(dense, {"gate_up_proj": up_record, "down_proj": down_record})
    x = torch.randn(1, hidden, dtype=torch.bfloat16)
    share = torch.full((1, top_k), 1 / top_k)

    def packed(chosen: torch.Tensor) -> torch.Tensor:
        offsets = torch.searchsorted(chosen, torch.arange(experts + 1))
        gate, linear = grouped_linear(x.expand(top_k, hidden), up, offsets, 2 * inner).chunk(2, -1)
        return grouped_linear(F.silu(gate) * linear, down, offsets, hidden).sum(0)

    def dense_linear(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> Callable[..., torch.Tensor]:
        def run(chosen: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(hidden, dtype=x.dtype)
            for expert in chosen.tolist():
                gate, linear = F.linear(x, gate_up[expert]).chunk(2, -1)
                total += F.linear(F.silu(gate) * linear, down[expert])[0]
            return total

        return run

    racers = {
        "packed": packed,
        "bf16_linear": dense_linear(dense.gate_up_proj, dense.down_proj, x),
        "packed_module": lambda chosen: module(x, chosen[None], share),
        "bf16_module": lambda chosen: dense(x, chosen[None], share),
    }
    weights = top_k * 3 * hidden * inner
    stored = (up_record.nbytes + down_record.nbytes) * top_k / experts
    nbytes = {"packed": stored, "packed_module": stored, "bf16_linear": 2.0 * weights, "bf16_module": 2.0 * weights}
    if args.fp32:
        racers["fp32_linear"] = dense_linear(dense.gate_up_proj.float(), dense.down_proj.float(), x.float())
        nbytes["fp32_linear"] = 4.0 * weights
    return racers, nbytes


def race(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of threads."""
    racers, nbytes = contestants(args)
    weights = args.top_k * 3 * args.hidden * args.intermediate
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        first = {name: run(torch.arange(args.top_k)).double().flatten() for name, run in racers.items()}
        scale = first["bf16_linear"].abs().max()
        for name, values in first.items():  # correct before fast; a module's output is the mean, a linear's the sum
            values = values * (args.top_k if name.endswith("module") else 1)
            error = ((values - first["bf16_linear"]).abs().max() / scale).item()
            if not error < 0.05:
                raise SystemExit(f"{name} is wrong by {error}")
        for threads in args.threads:
            torch.set_num_threads(threads)
            times: dict[str, list[float]] = {name: [] for name in racers}
            order = torch.empty(0, dtype=torch.int64)
            for step in range(args.steps + args.warmup):
                if len(order) < args.top_k:
                    order = torch.randperm(args.experts, generator=generator)
                chosen, order = order[: args.top_k].sort().values, order[args.top_k :]
                for name, run in racers.items():
                    begin = time.perf_counter()
                    run(chosen)
                    if step >= args.warmup:
                        times[name].append(time.perf_counter() - begin)
            entry: dict[str, Any] = {"threads": threads}
            entry |= {n: summary(t, weights, nbytes[n]) for n, t in times.items()}
            medians = {name: statistics.median(t) for name, t in times.items()}
            entry["speedup_over_bf16_linear"] = round(medians["bf16_linear"] / medians["packed"], 3)
            entry["speedup_over_bf16_module"] = round(medians["bf16_module"] / medians["packed_module"], 3)
            entry["read_limit_gigabytes_per_second"] = round(read_limit(threads), 1)
            rows.append(entry)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    rows = race(args)
    for row in rows:
        print(json.dumps(row, indent=1))
    if args.output is not None:
        names = ("hidden", "intermediate", "experts", "top_k", "bits", "group", "steps")
        write_results(
            args.output,
            "experts-vs-bf16",
            rows,
            cpu_features=_C.cpu_features(),
            torch=torch.__version__,
            load_average_before=load,
            shape={name: getattr(args, name) for name in names},
        )


if __name__ == "__main__":
    main()
