"""Writes the tables of README.md and cpp/FORMAT.md from the JSON files in bench/results, between markers.

    python bench/tables.py            # rewrite them
    python bench/tables.py --check    # exit code 1 if one is stale

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A marker without a file, or a file that no marker
uses, is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "cpp/FORMAT.md")
MARKER = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def origin(result: dict[str, Any]) -> str:
    """Where the numbers come from, in one sentence."""
    return f"{result['device']}, {result['date']}, commit {result['commit']}, `{result['command']}`."


def quality(result: dict[str, Any]) -> list[str]:
    """Formats of one model against the original (bench/compression/quality.py)."""
    lines = [
        "| experts stored as | bits per expert weight | bits per parameter | perplexity | KL divergence "
        "| same top token | same experts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        sizes = f"{row['bits_per_expert_weight']:.3f} | {row['bits_per_parameter']:.3f}"
        perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}"
        if row["name"] == "original":
            lines.append(f"| original (bfloat16) | {sizes} | {perplexity} | | | |")
            continue
        kl = f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        shares = f"{row['top1_agreement']:.1%} | {row['router_agreement']:.1%}"
        lines.append(f"| {row['name']} | {sizes} | {perplexity} | {kl} | {shares} |")
    first = result["rows"][0]
    lines += [
        "",
        f"{result['model']}, {first['windows']} windows of {first['window']} tokens, {result['dtype']}, "
        f"± one standard error clustered by window. {origin(result)}",
    ]
    return lines


def speed(row: dict[str, Any]) -> str:
    """Median and range over the repetitions, in million weights per second."""
    low, high = (value / 1e6 for value in row["weights_per_second_range"])
    return f"{row['weights_per_second'] / 1e6:.0f} ({low:.0f} to {high:.0f})"


def codec(result: dict[str, Any]) -> list[str]:
    """Speed of the codecs on one core (bench/cpu/codec.cpp)."""
    names = {
        "rtn_and_pack": "round to nearest and pack",
        "ternary_encode": "ternary, encode",
        "ternary_decode_scalar": "ternary, scalar decode",
    }
    lines = [
        "| what | | M weights/s, median (range) | bits per weight | over the entropy |",
        "|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "bits" in row:
            lines.append(
                f"| {names[row['name']]} | int{row['bits']} g128 | {speed(row)} | {row['bits_per_weight']:.3f} | |"
            )
        else:
            share = f"{row['zeros_permille'] / 10:g} % zeros"
            over = f"{row['code_over_entropy_pct']:.1f} %"
            lines.append(f"| {names[row['name']]} | {share} | {speed(row)} | {row['code_bits']:.3f} | {over} |")
    lines += [
        "",
        f"One core, {result['repetitions']} repetitions; a ternary matrix is 1366 x 768, all metadata and one level a "
        f"row counted. {origin(result)}",
    ]
    return lines


def ternary_codes(result: dict[str, Any]) -> list[str]:
    """The candidates for `ternary` side by side (bench/cpu/ternary_codes.cpp)."""
    zeros = sorted({row["zeros_permille"] for row in result["rows"]})
    lines = [
        "| code | " + " | ".join(f"{z / 10:g} % zeros" for z in zeros) + " |",
        "|---|" + "---:|" * len(zeros),
    ]
    codes: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        name = row["name"] + (f", {row['limit']} bits" if "limit" in row else "")
        codes.setdefault(name, {})[row["zeros_permille"]] = row
    for name, by_zeros in codes.items():
        cells = [
            f"+{by_zeros[z]['code_over_entropy_pct']:.1f} %, {by_zeros[z]['weights_per_second'] / 1e6:.0f} M/s"
            for z in zeros
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Over the entropy, and weights decoded per second. {origin(result)}"]
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


def calibrated(result: dict[str, Any]) -> list[str]:
    """Calibrated formats on two texts (bench/compression/calibrated.py)."""
    lines = [
        "| experts stored as | bits per expert weight | perplexity | KL divergence | same experts "
        "| WikiText-2: perplexity | KL divergence | same experts |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = []
        for text in ("held_out", "other"):
            quality = row[text]
            cells.append(f"{quality['perplexity']:.2f} ± {quality['perplexity_se']:.2f}")
            measured = row["name"] != "original"
            cells += [f"{quality['kl']:.4f}", f"{quality['router_agreement']:.1%}"] if measured else ["", ""]
        lines.append(f"| {row['name']} | {row['bits_per_expert_weight']:.3f} | " + " | ".join(cells) + " |")
    first = result["rows"][0]["held_out"]
    lines += [
        "",
        f"{result['model']}, {first['windows']} windows of {first['window']} tokens of each text, {result['dtype']}, "
        f"± one standard error clustered by window. {origin(result)}",
    ]
    return lines


def fit(result: dict[str, Any]) -> list[str]:
    """Mixed formats within a budget beside uniform ones (bench/compression/fit.py)."""
    lines = [
        "| experts stored as | bits per expert weight | perplexity | KL divergence | predicted |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["bits_per_expert_weight"]):
        if row["name"] == "original":
            continue
        name = f"**{row['name']}**" if row["kind"] == "fit" else row["name"]
        lines.append(
            f"| {name} | {row['bits_per_expert_weight']:.3f} | {row['perplexity']:.2f} ± {row['perplexity_se']:.2f} "
            f"| {row['kl']:.3f} | {row['predicted_kl']:.3f} |"
        )
    lines += ["", f"{result['model']}, method {result['method']}, {result['dtype']}. {origin(result)}"]
    return lines


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


def int_linear(result: dict[str, Any]) -> list[str]:
    """Products of int matrices and few tokens on a GPU (bench/gpu/int_linear.py)."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    cells = {(*row["shape"], row["format"], row["tokens"]): row for row in result["rows"]}
    lines = [
        "| N x K | format | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in tokens) + " | of a copy's bytes/s |",
        "|---|---|" + "---:|" * (len(tokens) + 1),
    ]
    for rows, cols, kind in dict.fromkeys(key[:3] for key in cells):
        of = [cells[rows, cols, kind, n] for n in tokens]
        shown = " | ".join(f"{row['median_us']:.1f} ({row['speedup']:.2f}x)" for row in of)
        lines.append(f"| {rows} x {cols} | {kind} | {shown} | {of[0]['share_of_copy_bandwidth']:.0%} |")
    lines += [
        "",
        "Microseconds in a CUDA graph, weights rotating past the cache, and how many times as fast as cuBLAS in "
        "bfloat16. The last column is of one token's codes and scales, a copy's being "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s read and written. {origin(result)}",
    ]
    return lines


def int_experts(result: dict[str, Any]) -> list[str]:
    """Whole layers of int experts on a GPU (bench/gpu/int_experts.py)."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    cells = {(row["model"], row["format"], row["tokens"]): row for row in result["rows"]}
    lines = [
        "| layer of | format | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in tokens) + " |",
        "|---|---|" + "---:|" * len(tokens),
    ]
    for model, kind in dict.fromkeys(key[:2] for key in cells):
        of = [cells[model, kind, n] for n in tokens]
        shown = " | ".join(f"{r['median_us']:.0f} ({r['speedup']:.2f}x), {r['memory_limit_us']:.0f}" for r in of)
        lines.append(f"| {model} | {kind} | {shown} |")
    lines += [
        "",
        "Microseconds in a CUDA graph, from ids and routing weights to the sums over a token's experts; in brackets "
        "how many times as fast as bfloat16 grouped products and their gate, routing and sums left out; behind them "
        f"what the bytes of the experts chosen take at a copy's {result['copy_bytes_per_second'] / 1e12:.2f} TB/s. "
        f"Routing is skewed and changes from call to call. {origin(result)}",
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


def recovery(result: dict[str, Any]) -> list[str]:
    """Compressed models before recovery and after it (bench/compression/recovery.py)."""
    headings = {"light": "light recovery", "all": "also attention, embedding", "scales": "scales only"}
    original, *rows = result["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows if "variant" in row))
    columns = ["", *(f"{headings[variant.split(',')[0]]}: " for variant in variants)]
    lines = [
        "| experts stored as | bits per expert weight "
        + "".join(f"| {column}perplexity | KL divergence " for column in columns)
        + "|",
        "|---|---:|" + "---:|---:|" * len(columns),
        f"| original | 16.000 | {original['perplexity']:.2f} ± {original['perplexity_se']:.2f} | "
        + "| | " * len(variants)
        + "|",
    ]
    starts = [row for row in rows if "variant" not in row]
    for start in sorted(starts, key=lambda row: -row["bits_per_expert_weight"]):
        after = {row["variant"]: row for row in rows if row.get("start") == start["name"]}
        cells = [
            f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f} | {row['kl']:.4f}"
            for row in (start, *(after[variant] for variant in variants))
        ]
        most = max(row["bits_per_expert_weight"] for row in (start, *after.values()))
        lines.append(f"| {start['name']} | {most:.3f} | " + " | ".join(cells) + " |")
    steps = rows[-1]["steps"]
    lines += [
        "",
        f"{result['model']}, {steps} steps of {result['batch']} windows of {original['window']} tokens, "
        f"{original['windows']} windows evaluated, ± one standard error clustered by window. {origin(result)}",
    ]
    return lines


def large(result: dict[str, Any]) -> list[str]:
    """Gigabytes through calibrated compression on a small machine (bench/compression/large.py)."""
    lines = [
        "| run | minutes | peak memory beyond torch | read | written |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        read, written = (
            f"{row[f'{kind}_bytes'] / 1e9:.1f} GB ({row[f'{kind}_mb_per_second']:.0f} MB/s)"
            for kind in ("read", "written")
        )
        lines.append(
            f"| {row['name']} | {row['seconds'] / 60:.1f} | {row['peak_beyond_torch_bytes'] / 1e9:.1f} GB "
            f"| {read} | {written} |"
        )
    config = result["config"]
    become = f"become {result['output_bytes'] / 1e9:.1f} GB"
    if result.get("job") == "prune":
        report = result["report"]
        become = f"pruned to {report['settings']['pattern']} by {report['settings']['method']}"
    lines += [
        "",
        f"{config['num_hidden_layers']} layers of {config['num_local_experts']} experts of {config['hidden_size']} x "
        f"{config['moe_intermediate_size']}, {result['source_bytes'] / 1e9:.1f} GB in bfloat16, {become}; "
        f"{result['tokens']} calibration tokens, {result['threads']} threads. "
        f"Load average before: {result['load_average_before'][0]:.1f}. {origin(result)}",
    ]
    return lines


def scaling(result: dict[str, Any]) -> list[str]:
    """Sparse scaling laws against what was published (bench/compression/scaling.py)."""
    lines = [
        "| runs | Huber loss, published coefficients | fitted here | coefficients differ by | largest error of the fit "
        "| gain at 75 % sparsity, fitted | held-out run: published, fitted | optimal sparsity against a search |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = {"vit": "ViT, JFT-4B", "t5": "T5, C4"}
    for row in result["rows"]:
        pairs = [(row["fitted"][key], value) for key, value in row["published"].items()]
        differ = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        low, high = row["gain_75_interval"]
        held = row.get("held_out")
        cells = [
            f"{names[row['name']]}, {row['runs']}",
            f"{row['published_objective']:.3e}",
            f"{row['objective']:.3e}",
            f"{differ:.2%}" if differ < 0.01 else f"{differ:.0%}",
            f"{row['largest_error']:.1%}",
            f"{row['gain_75_fitted']:.2f} ({low:.2f} to {high:.2f})",
            f"{held['published']:+.2%}, {held['fitted']:+.2%}" if held else "",
            f"{max(row['optimal_difference'].values()):.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    vit = result["rows"][0]
    lines += [
        "",
        f"Intervals hold 90 %. {vit['agreeing_starts']} of {vit['starts']} random starts of the ViT fit end in this "
        f"minimum. The search tries 100,000 sparsities for 100 pairs of size and compute. {origin(result)}",
    ]
    return lines


def pruning(result: dict[str, Any]) -> list[str]:
    """One-shot pruning methods by pattern (bench/compression/pruning.py)."""
    names = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "alps": "ALPS"}
    original, *rows = result["rows"]
    cells = {(row["name"].rpartition(" ")[0], row["method"]): row for row in rows}
    lines = ["| zeros in the experts | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(names)]
    for pattern in dict.fromkeys(pattern for pattern, _ in cells):
        of = [cells[pattern, method] for method in names]
        shown = [f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}, KL {row['kl']:.3f}" for row in of]
        lines.append(f"| {pattern} | {' | '.join(shown)} |")
    calibrated = max(row["calibration_tokens"] for row in rows)
    minutes = {
        name: max(row["prune_seconds"] for row in rows if row["method"] == method) / 60
        for method, name in names.items()
    }
    lines += [
        "",
        f"Perplexity, and KL divergence from the original, whose perplexity is {original['perplexity']:.2f} ± "
        f"{original['perplexity_se']:.2f}. {result['model']}, {original['windows']} windows of {original['window']} "
        f"tokens, {result['dtype']}, ± one standard error clustered by window; calibrated on {calibrated:,} tokens. At "
        f"most {', '.join(f'{name} {value:.1f}' for name, value in minutes.items())} minutes. {origin(result)}",
    ]
    return lines


def pruning_experts(result: dict[str, Any]) -> list[str]:
    """Experts taken out by several scores (bench/compression/pruning_experts.py)."""
    cells = {(row["keep"], row["score"]): row for row in result["rows"]}
    scores = list(dict.fromkeys(score for _, score in cells))
    lines = [
        "| experts per layer | parameters | " + " | ".join(score.replace("_", " ") for score in scores) + " |",
        "|---|---:|" + "---:|" * len(scores),
    ]
    for keep in dict.fromkeys(keep for keep, _ in cells):
        of = [cells[keep, score] for score in scores]
        share = of[0]["parameters"] / of[0]["original_parameters"]
        shown = " | ".join(f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}" for row in of)
        lines.append(f"| {keep} of {of[0]['experts']} | {share:.0%} | {shown} |")
    first = result["rows"][0]
    lines += [
        "",
        f"Perplexity. {result['model']}, {first['windows']} windows of {first['window']} tokens, {result['dtype']}, ± "
        f"one standard error clustered by window; watched on {first['calibration_tokens']:,} tokens. {origin(result)}",
    ]
    return lines


def jax_overhead(result: dict[str, Any]) -> list[str]:
    """Training steps with a wrapped optimizer (bench/jax/overhead.py)."""
    lines = [
        "| optimizer | step, ms | AdamW alone, ms | slower (quartiles) | step that changes masks, ms | slower in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = (value - 1 for value in row["ratio_quartiles"])
        plain = row["name"] == "adamw"
        cells = [
            "AdamW, against itself" if plain else row["name"],
            f"{row['step_ms']:.0f}",
            f"{row['plain_ms']:.0f}",
            f"{row['ratio'] - 1:+.1%} ({low:+.1%} to {high:+.1%})",
            "" if plain else f"{row['change_ms']:.0f}",
            "" if plain else f"{row['overhead']:+.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"A transformer of {result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step, float32, "
        f"{result['rounds']} alternate pairs each; masks change every {result['every']} steps. jax {result['jax']}, "
        f"optax {result['optax']}. {origin(result)}",
    ]
    return lines


def maskllm(result: dict[str, Any]) -> list[str]:
    """Learned masks against one-shot ones (bench/gpu/maskllm.py)."""
    original, *rows = result["rows"]
    best = next(row for row in rows if row["name"] == "sparsegpt")["perplexity"] - original["perplexity"]
    lines = [
        "| mask | perplexity | KL divergence | nearer to dense than SparseGPT | minutes |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        nearer = 1 - (row["perplexity"] - original["perplexity"]) / best
        lines.append(
            f"| {row['name']} | {row['perplexity']:.2f} ± {row['perplexity_se']:.2f} | {row['kl']:.3f} "
            f"| {'' if row['name'] == 'sparsegpt' else f'{nearer:+.0%}'} | {row['train_seconds'] / 60:.1f} |"
        )
    lines += [
        "",
        f"{rows[0]['pattern']} in the experts of {result['model']}; the original has {original['perplexity']:.2f} ± "
        f"{original['perplexity_se']:.2f}. Learned in {result['steps']} steps of {result['batch']} x "
        f"{result['window']} tokens, {result['dtype']}; one-shot methods see {result['calibration_tokens']:,} tokens, "
        f"and SparseGPT updates what stays. Evaluated in float32, {original['windows']} windows. {origin(result)}",
    ]
    return lines


def squarehead(result: dict[str, Any]) -> list[str]:
    """Gradual pruning by loss (bench/gpu/squarehead.py)."""
    original, *rows = result["rows"]
    lines = ["| loss | zeros | perplexity | KL divergence | minutes |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['name']} | {row['sparsity']:.1%} | {row['perplexity']:.2f} ± {row['perplexity_se']:.2f} "
        f"| {row['kl']:.3f} | {row['train_seconds'] / 60:.1f} |"
        for row in rows
    ]
    lines += [
        "",
        f"Experts of {result['model']}, whose perplexity is {original['perplexity']:.2f} ± "
        f"{original['perplexity_se']:.2f}, pruned gradually ({result['pattern']}) in {result['steps']} steps of "
        f"{result['batch']} x {result['window']} tokens, the same for all, {result['dtype']}; learning rate "
        f"{result['lr']:g}. Evaluated in float32, {original['windows']} windows. {origin(result)}",
    ]
    return lines


def pruning_throughput(result: dict[str, Any]) -> list[str]:
    """Weights per second of one-shot pruning on a GPU (bench/gpu/pruning_throughput.py)."""
    cells = {(tuple(row["shape"]), row["method"], row["pattern"]): row for row in result["rows"]}
    columns = list(dict.fromkeys((method, pattern) for _, method, pattern in cells))
    lines = [
        "| shape | " + " | ".join(f"{method}, {pattern}" for method, pattern in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for shape in dict.fromkeys(shape for shape, _, _ in cells):
        of = [cells.get((shape, *column)) for column in columns]
        shown = [f"{row['weights_per_second'] / 1e6:,.0f}" if row else "" for row in of]
        lines.append(f"| {shape[0]}x{shape[1]} | {' | '.join(shown)} |")
    lines += [
        "",
        f"Millions of weights per second, from {result['rows'][0]['tokens']:,} tokens' activations of every expert to "
        f"masks and updated weights, medians; unstructured: half of the weights. {origin(result)}",
    ]
    return lines


RENDERERS = {
    "maskllm": maskllm,
    "pruning-throughput": pruning_throughput,
    "squarehead": squarehead,
    "jax-overhead": jax_overhead,
    "pruning": pruning,
    "pruning-experts": pruning_experts,
    "scaling": scaling,
    "recovery": recovery,
    "gptq-gpu": gptq_gpu,
    "two-gpus": two_gpus,
    "int-linear-gpu": int_linear,
    "int-experts-gpu": int_experts,
    "cpu-kernels": cpu_kernels,
    "cpu-model": cpu_model,
    "generation": generation,
    "calibrated": calibrated,
    "fit": fit,
    "large": large,
    "quality": quality,
    "codec": codec,
    "ternary-codes": ternary_codes,
    "experts-vs-bf16": experts_vs_bf16,
}


def render(results: Path) -> dict[Path, tuple[str, str]]:
    """Every document as it is and as it should be. Raises ValueError for a marker without a file and the reverse."""
    used = set()

    def table(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise ValueError(f"a table wants {path.name}, which is not in {results.name}")
        used.add(path.stem)
        result = json.loads(path.read_text(encoding="utf-8"))
        return match[1] + "\n".join(RENDERERS[result["benchmark"]](result)) + "\n" + match[3]

    texts = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    rendered = {path: (text, MARKER.sub(table, text)) for path, text in texts.items()}
    unused = sorted(path.name for path in results.glob("*.json") if path.stem not in used)
    if unused:
        raise ValueError(f"no table shows {', '.join(unused)}")
    return rendered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is stale")
    check = parser.parse_args().check
    try:
        documents = render(ROOT / "bench" / "results")
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    stale = {path: new for path, (old, new) in documents.items() if new != old}
    for path, new in stale.items():
        if check:
            print(f"tables: {path.name} is stale: run python bench/tables.py", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
