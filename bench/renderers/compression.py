"""Compressed models: quality, sizes, time and memory of compressing."""

from __future__ import annotations

from typing import Any

from .origin import origin


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


RENDERERS = {
    "recovery": recovery,
    "calibrated": calibrated,
    "fit": fit,
    "large": large,
    "quality": quality,
    "codec": codec,
    "ternary-codes": ternary_codes,
}
