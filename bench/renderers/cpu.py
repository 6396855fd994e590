"""Kernels on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .origin import origin


def cpu_kernels(result: dict[str, Any]) -> list[str]:
    """Our CPU kernels as multiples of llama.cpp's (bench/cpu/compare.py): "1.8x / 1.7x" on 1 and on 2 threads."""
    what = {
        "linear": "matrix 4096 x 14336",
        "experts_up": "8 of 128 experts, 768 x 2048",
        "experts_down": "8 of 128 experts, 2048 x 768",
        "layer": "whole layer: gate, up, SwiGLU, down, sum; rival: its three products",
    }
    batches = sorted({row["tokens"] for row in result["rows"]})
    threads = sorted({row["threads"] for row in result["rows"]})
    contests: dict[tuple[str, str, str], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in result["rows"]:
        key = row["shape"], row["kind"], row["rival"]
        contests.setdefault(key, {})[row["tokens"], row["threads"]] = row

    def join(cells: dict[tuple[int, int], dict[str, Any]], tokens: int, show: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(show(cells[tokens, t]) for t in threads if (tokens, t) in cells)

    def ratio(row: dict[str, Any]) -> str:
        return f"{row['ratio']:.{1 if row['ratio'] >= 1 else 2}f}x"

    def share(side: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[side]['share_of_read_limit']:.0%}"

    lines = [
        "| ours | rival | "
        + " | ".join(f"{n} token{'s' * (n > 1)}" for n in batches)
        + " | of the read limit | rival |",
        "|---|---|" + "---:|" * (len(batches) + 2),
    ]
    previous = ""
    for (shape, kind, rival), cells in sorted(contests.items(), key=lambda item: list(what).index(item[0][0])):
        if shape != previous:
            lines.append(f"| **{what[shape]}** |" + " |" * (len(batches) + 3))
            previous = shape
        row_cells = [join(cells, n, ratio) for n in batches]
        row_cells += [join(cells, 1, share("ours")), join(cells, 1, share("theirs"))]
        lines.append(f"| {kind.replace('_', ' ')} | {rival} | " + " | ".join(row_cells) + " |")
    limits = result["limits_giga_per_second"]
    reads = " / ".join(f"{limits[f'dram_read/threads:{t}']:.1f}" for t in threads)
    lines += [
        "",
        f"How many times as fast as llama.cpp (ggml {result['ggml']}, its fastest buffer type), on "
        f"{' / '.join(map(str, threads))} threads: medians of {result['repetitions']} alternate repetitions, weights "
        f"cold. The last columns are the stored bytes that one token reads per second, as a share of what the machine "
        f"reads at most ({reads} GB/s). Load average before: {result['load_average_before'][0]:g}. {origin(result)}",
    ]
    return lines


def cpu_model(result: dict[str, Any]) -> list[str]:
    """Predicted and measured cycles per line (bench/cpu/units.py)."""
    ways = list(dict.fromkeys((row["way"], row["tokens"]) for row in result["rows"]))
    cells = {(row["kind"], row["way"], row["tokens"]): row for row in result["rows"]}
    heads = [f"{way}, {tokens} token{'s' * (tokens > 1)}" for way, tokens in ways]
    lines = ["| weights | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(ways)]
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        row = [cells[kind, way, tokens] for way, tokens in ways]
        shown = [f"{cell['predicted']:.1f} / {cell['cycles']:.1f}" for cell in row]
        lines.append(f"| {kind.replace('_', ' ')} | " + " | ".join(shown) + " |")
    lines += [
        "",
        f"Cycles per 64-byte line of packed codes, predicted for {result['core']} / measured ({result['isa']}, weights "
        f"in the second-level cache). {origin(result)}",
    ]
    return lines


def generation(result: dict[str, Any]) -> list[str]:
    """Tokens per second on a CPU (bench/cpu/generation.py)."""
    lines = [
        "| model | experts stored as | bits per expert weight | tokens/s (range) | of bfloat16 |",
        "|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = row["range"]
        lines.append(
            f"| {row['model']} | {row['weights']} | {row['expert_bits']:.2f} | {row['tokens_per_second']:.1f} "
            f"({low:.1f} to {high:.1f}) | {row['ratio']:.1f}x |"
        )
    same: dict[str, list[str]] = {}
    for row in result["agreement"]:
        same.setdefault(row["compute"], []).append(f"{row['weights']} {row['same_until']} of {row['tokens']}")
    agreement = "; ".join(f"{compute}: {', '.join(values)}" for compute, values in same.items())
    lines += [
        "",
        f"Greedy generation of {result['tokens']} tokens on {result['threads']} threads, medians of {result['rounds']} "
        f"alternate rounds; bfloat16 activations, and everything but the experts too. Tokens of the trained model in "
        "float32 that equal those of the readable reference before the first that does not, by way to compute: "
        f"{agreement}. {origin(result)}",
    ]
    return lines


def experts_vs_bf16(result: dict[str, Any]) -> list[str]:
    """Batch 1: packed experts against PyTorch's bf16 (bench/cpu/experts_vs_bf16.py)."""
    shape = result["shape"]
    lines = [
        "| threads | packed, ms (quartiles) | bf16 linear, ms (quartiles) | packed reads | of a plain sum's | faster |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row[n]['median_ms']:.2f} ({row[n]['quartiles_ms'][0]:.2f} to {row[n]['quartiles_ms'][1]:.2f})"
            for n in ("packed", "bf16_linear")
        ]
        rate = row["packed"]["gigabytes_per_second"]
        share = rate / row["read_limit_gigabytes_per_second"]
        lines.append(
            f"| {row['threads']} | {cells[0]} | {cells[1]} | {rate:.1f} GB/s | {share:.0%} "
            f"| {row['speedup_over_bf16_linear']:.1f}x |"
        )
    lines += [
        "",
        f"One token through {shape['top_k']} of {shape['experts']} experts of "
        f"{shape['hidden']} x {shape['intermediate']}, int{shape['bits']} g{shape['group']}, "
        f"weights rotating past the cache. {origin(result)}",
    ]
    return lines


RENDERERS = {
    "cpu-kernels": cpu_kernels,
    "cpu-model": cpu_model,
    "generation": generation,
    "experts-vs-bf16": experts_vs_bf16,
}
