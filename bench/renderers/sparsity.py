"""Pruning, sparse training, scaling laws."""

from __future__ import annotations

from typing import Any

from .origin import origin


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
        f"and SparseGPT and ALPS update what stays. Evaluated in float32, {original['windows']} windows. "
        f"{origin(result)}",
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


RENDERERS = {
    "maskllm": maskllm,
    "pruning-throughput": pruning_throughput,
    "squarehead": squarehead,
    "jax-overhead": jax_overhead,
    "pruning": pruning,
    "pruning-experts": pruning_experts,
    "scaling": scaling,
}
