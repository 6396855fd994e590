"""Kernels on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .origin import origin

# What was aimed at, by kind and rival: times the rival's speed with 1, 32 and 512 tokens; for matrices and for experts.
# Set on a processor with AMX, of which the rival makes little use.
AIMS: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "linear": {
        ("int4_g128", "q4_0"): (1.2, 3, 4),
        ("int4_g128", "q4_K"): (1.8, 2.5, 3),
        ("int3_g128", "q3_K"): (2, 5, 4),
        ("int3_g128", "iq3_xxs"): (7, 3, 2.5),
        ("int2_g128", "q2_K"): (2.2, 4, 4),
        ("int2_g128", "iq2_xxs"): (4.5, 4, 3),
        ("ternary", "tq1_0"): (2.5, 5, 5),
        ("ternary", "tq2_0"): (2.5, 5, 5),
    },
    "experts": {
        ("int4_g128", "q4_0"): (1.7, 3, 4),
        ("int4_g128", "q4_K"): (1.7, 3, 4),
        ("int2_g128", "q2_K"): (2, 3, 4),
        ("ternary", "tq2_0"): (2, 2, 4),
    },
}


def aim_of(row: dict[str, Any]) -> float | None:
    aims = AIMS["linear" if row["shape"] == "linear" else "experts"].get((row["kind"], row["rival"]))
    return None if aims is None else dict(zip((1, 32, 512), aims, strict=True)).get(row["tokens"])


def most(row: dict[str, Any], limits: dict[str, float]) -> float:
    """How many times as fast as the rival our bits per weight could be here: the arithmetic or the memory ends it."""
    ours, theirs = row["ours"], row["theirs"]
    arithmetic = limits[f"vpdpbusd/threads:{row['threads']}"] / theirs["gigaflops"]
    giga_weights = theirs["weights_per_second"] * ours["gigabytes_per_second"] / ours["weights_per_second"]
    return min(arithmetic, limits[f"dram_read/threads:{row['threads']}"] / giga_weights)


def weights_per_second(
    contests: dict[tuple[str, str, str], dict[tuple[int, int], dict[str, Any]]], threads: list[int]
) -> str:
    """Of every kind, most bits first: fewer bits are to be faster."""
    rates: dict[str, str] = {}
    for (shape, kind, _), cells in contests.items():
        if shape == "linear":
            each = [f"{cells[1, t]['ours']['weights_per_second'] / 1e9:.0f}" for t in threads if (1, t) in cells]
            rates[kind] = " / ".join(each)
    order = ["int8_g128", "int4_g128", "int3_g128", "int2_g128", "ternary"]
    return ", ".join(f"{kind.replace('_', ' ')} {rates[kind]}" for kind in order if kind in rates)


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

    limits = result["limits_giga_per_second"]

    def contest(cells: dict[tuple[int, int], dict[str, Any]], tokens: int) -> str:
        shown = join(cells, tokens, ratio)
        rows = [cells[tokens, t] for t in threads if (tokens, t) in cells]
        aim = aim_of(rows[0]) if rows else None
        if aim is None:
            return shown
        counts[0] += 1
        if all(row["ratio"] >= aim for row in rows):
            counts[1] += 1
            return f"**{shown}**"
        bound = min(most(row, limits) for row in rows)
        counts[2] += bound < aim
        return f"{shown} ({aim:g}x" + (f", limit {bound:.1f}x)" if bound < aim else ")")

    counts = [0, 0, 0]  # aims, met, beyond the limits

    lines = [
        "| ours | rival | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in batches) + " |",
        "|---|---|" + "---:|" * len(batches),
    ]
    previous = ""
    for (shape, kind, rival), cells in sorted(contests.items(), key=lambda item: list(what).index(item[0][0])):
        if shape != previous:
            lines.append(f"| **{what[shape]}** |" + " |" * (len(batches) + 1))
            previous = shape
        row_cells = [contest(cells, n) for n in batches]
        lines.append(f"| {kind.replace('_', ' ')} | {rival} | " + " | ".join(row_cells) + " |")
    reads = " / ".join(f"{limits[f'dram_read/threads:{t}']:.1f}" for t in threads)
    lines += [
        "",
        f"How many times as fast as llama.cpp (ggml {result['ggml']}, its fastest buffer type), on "
        f"{' / '.join(map(str, threads))} threads: medians of {result['repetitions']} alternate repetitions, weights "
        f"cold. The machine reads {reads} GB/s at most. Load average before: {result['load_average_before'][0]:g}. "
        f"{origin(result)}",
        "",
        f"One token through the matrix, G weights per second: {weights_per_second(contests, threads)}.",
        "",
        f"Bold: {counts[1]} of {counts[0]} aims, met with either number of threads. In brackets: an aim that was not "
        f"reached, and where it lies beyond the machine ({counts[2]} of them), its limit: the rival's time over what "
        "int8 products alone would take, or reading our bits at the read limit.",
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


def cpu_read_limit(result: dict[str, Any]) -> list[str]:
    """One token's share of the read limit (bench/cpu/read_limit.py)."""
    threads = sorted({row["threads"] for row in result["rows"]})
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    cells = {(row["kind"], row["shape"], row["threads"]): row for row in result["rows"]}
    names = {"linear": "matrix 4096 x 14336", "layer": "layer, 8 of 128 experts"}
    heads = [f"{names[shape]}: {what}" for shape in shapes for what in ("of the read limit (range)", "weights a byte")]
    lines = ["| weights | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        shown = []
        for shape in shapes:
            rows = [cells[kind, shape, t] for t in threads]
            ranges = [f"{row['share_range'][0]:.0%} to {row['share_range'][1]:.0%}" for row in rows]
            shares = [f"{row['share_of_read_limit']:.0%} ({range_})" for row, range_ in zip(rows, ranges, strict=True)]
            density = [row["share_of_read_limit"] * row["weights"] / row["stored_bytes"] for row in rows]
            shown += [" / ".join(shares), " / ".join(f"{value:.1f}" for value in density)]
        lines.append(f"| {kind.replace('_', ' ')} | " + " | ".join(shown) + " |")
    lines += [
        "",
        f"One token on {' / '.join(map(str, threads))} threads, medians of {result['repetitions']} repetitions; each "
        "product is followed by a plain read of as many bytes, and weights are those multiplied while the read takes "
        f"in a byte. Load average before: {result['load_average_before'][0]:g}: other work takes from rates and hardly "
        f"from shares. {origin(result)}",
    ]
    return lines


def cpu_errors(result: dict[str, Any]) -> list[str]:
    """Errors against float64 (bench/cpu/errors.py): the largest over the bits, by instruction set and group."""
    groups = sorted({row["group"] for row in result["rows"]})
    heads = [f"{what}, int8, g{group}" for what in ("product", "layer") for group in groups]
    lines = [
        "| instruction set | " + " | ".join([*heads, "product, float", "layer, float"]) + " |",
        "|---|" + "---:|" * (len(heads) + 2),
    ]
    for isa in dict.fromkeys(row["isa"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["isa"] == isa]
        cells = [
            f"{max(row[f'{what}_int8'] for row in mine if row['group'] == group):.2%}"
            for what in ("product", "layer")
            for group in groups
        ]
        cells += [f"{max(row[f'{what}_float'] for row in mine):.1e}" for what in ("product", "layer")]
        lines.append(f"| {isa} | " + " | ".join(cells) + " |")
    bits = ", ".join(str(b) for b in sorted({row["bits"] for row in result["rows"]}))
    lines += [
        "",
        f"Relative error (in norm) against float64 over the decoded weights, the largest of {bits} bits; normal "
        f"activations, random codes. {origin(result)}",
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
    "cpu-errors": cpu_errors,
    "cpu-read-limit": cpu_read_limit,
    "generation": generation,
    "experts-vs-bf16": experts_vs_bf16,
}
