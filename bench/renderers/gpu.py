"""Kernels and calibrated compression on GPUs."""

from __future__ import annotations

from typing import Any

from .origin import origin


def gptq_gpu(result: dict[str, Any]) -> list[str]:
    """Calibrated quantization on a GPU, from activations to packed records (bench/gpu/gptq_throughput.py)."""
    groups = {
        "statistics": ("statistics",),
        "factors": ("check, lean", "factorize"),
        "grids, levels": ("grids of rows", "levels"),
        "feedback, descent": ("feedback", "coordinate descent"),
        "errors": ("errors",),
        "to host": ("to host",),
    }
    lines = [
        f"| N x K | format | M weights/s (range) | {' | '.join(groups)} | pack | of the limit |",
        "|---|---|---:|" + "---:|" * (len(groups) + 2),
    ]
    for row in result["rows"]:
        stages = row["stages"]

        def total(names: tuple[str, ...], key: str, stages: dict[str, Any] = stages) -> float:
            return sum(stages[name][key] * stages[name]["times"] for name in names if name in stages)

        listed = tuple(name for names in groups.values() for name in names)
        per_weight = 1e9 / (row["chunk"] * row["shape"][0] * row["shape"][1])
        cells = [f"{total(names, 'seconds') * per_weight:.2f}" for names in (*groups.values(), ("pack",))]
        share = total(listed, "limit_seconds") / total(listed, "seconds")
        lines.append(
            f"| {row['shape'][0]} x {row['shape'][1]} | {row['format']} | {row['weights_per_second'] / 1e6:.0f} "
            f"({row['least'] / 1e6:.0f} to {row['most'] / 1e6:.0f}) | {' | '.join(cells)} | {share:.0%} |"
        )
    first = result["rows"][0]
    rates = [result[f"{name}_flops_per_second"] / 1e12 for name in ("float32", "bfloat16")]
    lines += [
        "",
        f"Stages in ns per weight; {result['sweeps']} sweeps, {first['tokens']} tokens an expert, 64 experts or more. "
        "Packing, on the CPU, overlaps with the next chunk. The limit: operations at "
        f"{rates[0]:.0f} (float32) and {rates[1]:.0f} TFLOP/s (bfloat16), or bytes at "
        f"{result['copy_bytes_per_second'] / 1e12:.1f} TB/s and to the host at "
        f"{result['to_host_bytes_per_second'] / 1e9:.0f} GB/s, as measured here, what takes longest in each stage. "
        f"{origin(result)}",
    ]
    return lines


def two_gpus(result: dict[str, Any]) -> list[str]:
    """Calibrated compression by several processes with a GPU each (bench/gpu/two_gpus.py)."""
    layers, experts, hidden, intermediate = result["shape"]
    first = result["rows"][0]
    lines = [
        "| GPUs | seconds | faster | seconds a layer | faster | with the start of processes | output error |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['processes']} | {row['seconds']:.1f} | {row['speedup']:.2f}x | {row['layer_seconds']:.2f} "
        f"| {first['layer_seconds'] / row['layer_seconds']:.2f}x | {row['wall_seconds']:.1f} "
        f"| {row['mean_relative_output_error']:.4f} |"
        for row in result["rows"]
    ]
    lines += [
        "",
        f"{result['format']}, {first['tokens']} tokens, {layers} layers of {experts} experts of {hidden} x "
        f"{intermediate}, top 8, {result['source_bytes'] / 1e9:.1f} GB. {origin(result)}",
    ]
    return lines


def header(tokens: list[int]) -> str:
    return " | ".join(f"{n} token{'s' * (n > 1)}" for n in tokens)


def times(row: dict[str, Any], digits: int) -> str:
    """Of the kernel that a call gets, or of those for few tokens and for many; and how much faster the fastest is."""
    found = [row[key] for key in ("few_us", "many_us") if key in row] or [row["median_us"]]
    shown = " / ".join(f"{time:.{digits}f}" for time in found)
    if "many_us" in row and len(found) == 1:
        shown = f"- / {shown}"
    return f"{shown} ({row['speedup']:.2f}x)"


def kernels(result: dict[str, Any]) -> str:
    both = any("few_us" in row for row in result["rows"])
    return "Kernel for few tokens / kernel for many, and the faster one's speedup. " if both else ""


def int_linear(result: dict[str, Any]) -> list[str]:
    """Products of int matrices on a GPU (bench/gpu/int_linear.py)."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    cells = {(*row["shape"], row["format"], row["tokens"]): row for row in result["rows"]}
    lines = [
        f"| N x K | format | {header(tokens)} | of a copy's bytes/s |",
        "|---|---|" + "---:|" * (len(tokens) + 1),
    ]
    for rows, cols, kind in dict.fromkeys(key[:3] for key in cells):
        of = [cells[rows, cols, kind, n] for n in tokens]
        shown = " | ".join(times(row, 1) for row in of)
        lines.append(f"| {rows} x {cols} | {kind} | {shown} | {of[0]['share_of_copy_bandwidth']:.0%} |")
        if "humming_us" in of[0]:
            rivals = " | ".join(f"{row['humming_us']:.1f}" for row in of)
            lines.append(f"| | {kind}, Humming | {rivals} | |")
    lines += [
        "",
        "Microseconds in a CUDA graph, weights rotating past the cache, and how many times as fast as cuBLAS in "
        "bfloat16. The last column is of one token's codes and scales, a copy's being "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s read and written. {kernels(result)}{origin(result)}",
    ]
    return lines


def int_experts(result: dict[str, Any]) -> list[str]:
    """Whole layers of int experts on a GPU (bench/gpu/int_experts.py)."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    cells = {(row["model"], row["format"], row["tokens"]): row for row in result["rows"]}
    lines = [
        f"| layer of | format | {header(tokens)} |",
        "|---|---|" + "---:|" * len(tokens),
    ]
    for model, kind in dict.fromkeys(key[:2] for key in cells):
        of = [cells[model, kind, n] for n in tokens]
        shown = " | ".join(f"{times(row, 0)}, {row['memory_limit_us']:.0f}" for row in of)
        lines.append(f"| {model} | {kind} | {shown} |")
        if "humming_us" in of[0]:
            rivals = " | ".join(f"{row['humming_us']:.0f}" for row in of)
            lines.append(f"| | {kind}, Humming | {rivals} |")
    humming = (
        "Humming's times are of its grouped products and a gate alone. "
        if any("humming_us" in row for row in result["rows"])
        else ""
    )
    lines += [
        "",
        "Microseconds in a CUDA graph, from ids and routing weights to the sums over a token's experts; in brackets "
        "how many times as fast as bfloat16 grouped products and their gate, routing and sums left out; behind them "
        f"what the bytes of the experts chosen take at a copy's {result['copy_bytes_per_second'] / 1e12:.2f} TB/s. "
        f"{humming}"
        f"Routing is skewed and changes from call to call. {kernels(result)}{origin(result)}",
    ]
    return lines


def ternary(result: dict[str, Any]) -> list[str]:
    """Linear layers and layers of experts of ternary matrices on a GPU (bench/gpu/ternary.py)."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    cells = {(*row["shape"], row["zeros"], row["tokens"]): row for row in result["rows"]}
    lines = [
        f"| N x K | zeros | bits per weight | {header(tokens)} | `int2` |",
        "|---|---:|---:|" + "---:|" * (len(tokens) + 1),
    ]
    for rows, cols, zeros in dict.fromkeys(key[:3] for key in cells):
        of = [cells[rows, cols, zeros, n] for n in tokens]
        shown = " | ".join(times(row, 1) for row in of)
        int2 = f"{of[0]['int2_us']:.1f}" if of[0]["int2_us"] else ""
        lines.append(f"| {rows} x {cols} | {zeros:.1%} | {of[0]['bits']:.3f} | {shown} | {int2} |")
    counts = sorted({row["tokens"] for row in result["layers"]})
    by_layer = {(row["model"], row["zeros"], row["tokens"]): row for row in result["layers"]}
    lines += [
        "",
        f"| layer of | zeros | bits per weight | {header(counts)} |",
        "|---|---:|---:|" + "---:|" * len(counts),
    ]
    for model, zeros in dict.fromkeys(key[:2] for key in by_layer):
        of = [by_layer[model, zeros, n] for n in counts]
        shown = " | ".join(times(row, 0) for row in of)
        lines.append(f"| {model} | {zeros:.1%} | {of[0]['bits']:.3f} | {shown} |")
    lines += [
        "",
        "Microseconds in a CUDA graph, and how many times as fast as bfloat16: cuBLAS, and grouped products with their "
        f"gate, routing and sums left out. The last column is one token's. {kernels(result)}{origin(result)}",
    ]
    rivals = [
        f"{row['shape'][0]} x {row['shape'][1]} {row['qmoe_us']:.1f} at {row['qmoe_bits']:.3f} bits "
        f"({row['qmoe_us'] / row['median_us']:.1f} times ours)"
        for row in result["rows"]
        if "qmoe_us" in row
    ]
    if rivals:
        lines += ["", f"QMoE's own kernel in the same run, one token: {', '.join(rivals)}."]
    return lines


def ternary_codec(result: dict[str, Any]) -> list[str]:
    """Encoding and decompression of ternary matrices on a GPU (bench/gpu/ternary_codec.py)."""
    columns = ("encode", "whole", "whole_bfloat16", "unpack", "dequantize", "cpu")
    lines = [
        "| matrices | N x K | zeros | bits per weight | encode | to the host | from bfloat16 | decode, layout "
        "| decode, record | CPU's encoder |",
        "|---:|---|---:|---:|" + "---:|" * len(columns),
    ]
    for row in result["rows"]:
        experts, rows, cols = row["shape"]
        cells = " | ".join(f"{row[f'{name}_weights_per_second'] / 1e9:.1f}" for name in columns)
        lines.append(f"| {experts} | {rows} x {cols} | {row['zeros']:.1%} | {row['bits']:.3f} | {cells} |")
    lines += [
        "",
        "G weights per second. Encode: the kernels in a CUDA graph; to the host: from trits on the GPU, int8 or "
        "bfloat16, to the record in host memory. Decode: to bfloat16 in a CUDA graph, from the layout of the products "
        f"and from the record. {origin(result)}",
    ]
    return lines


def generation(result: dict[str, Any]) -> list[str]:
    """Models of real configurations, token by token on one GPU (bench/gpu/generation.py)."""
    lines = [
        "| model | parameters | experts | sequences | tokens/s | GiB in use | of the time, reading weights |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if not row["fits"]:
            lines.append(f"| {row['model']} | | {row['experts']} | does not fit | | | |")
            continue
        reading = row["bytes_per_token"] / row["copy_bytes_per_second"] / row["step_seconds"]
        share = f"{reading:.0%}" if row["batch"] == 1 else ""
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e9:.0f} G | {row['experts']} | {row['batch']} "
            f"| {row['tokens_per_second']:.1f} | {row['gib']:.1f} | {share} |"
        )
    zeros = ", 88.5 % zeros" if any(row["experts"] == "ternary" for row in result["rows"]) else ""
    lines += [
        "",
        f"A step of decoding in a CUDA graph, the rest of the model in bfloat16; random weights{zeros}. The last "
        f"column: what a token reads, at a copy's bytes per second. {origin(result)}",
    ]
    return lines


RENDERERS = {
    "ternary-gpu": ternary,
    "ternary-codec-gpu": ternary_codec,
    "generation-gpu": generation,
    "gptq-gpu": gptq_gpu,
    "two-gpus": two_gpus,
    "int-linear-gpu": int_linear,
    "int-experts-gpu": int_experts,
}
