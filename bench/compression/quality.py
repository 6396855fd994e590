"""What each format costs in quality: every data-free method on one model, against the original, in float32.

    python bench/compression/quality.py --model novels-moe-28m --tokens test_tokens.npy \\
        --json bench/results/quality-novels-moe-28m.json

Each row compresses the model into a temporary directory (its size is what the bits are counted from), loads it like
any user would, and evaluates the first tokens in disjoint windows. All rows run side by side, so that the original's
predictions are computed once. `bench/tables.py` makes the README's table from the JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qmoe_core import Recipe, compress, load_model
from qmoe_core.evaluation import evaluate_all
from qmoe_core.progress import ProgressEvent
from qmoe_core.quickstart import original_sizes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results


def variants() -> dict[str, Recipe]:
    """Row name -> recipe, in the order of the table."""
    rows = {
        "int8 g128": Recipe.uniform("int8", 128),
        "int4 g128": Recipe.uniform("int4", 128),
        "int4 row": Recipe.uniform("int4", 0),
        "int3 g128": Recipe.uniform("int3", 128),
        "int2 g64": Recipe.uniform("int2", 64),
        # At 2 bits even the rounding of the scales shows.
        "int2 g64, float32 scales": Recipe.uniform("int2", 64, scale_dtype="float32"),
        "int4 finequant": Recipe.uniform("int4", method="finequant"),
    }
    rows |= {f"int{bits} moqe": Recipe.uniform(f"int{bits}", method="moqe") for bits in (8, 4, 3, 2)}
    rows |= {
        "ternary centroid": Recipe.uniform("ternary", method="ternary-centroid"),
        "ternary centroid symmetric": Recipe.uniform("ternary", method="ternary-centroid", levels="symmetric"),
        "ternary minmax": Recipe.uniform("ternary", method="ternary-minmax"),
    }
    return rows


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: sizes and quality."""
    tokens = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)
    original = load_model(arguments.model, dtype=torch.float32)
    models, sizes = {"original": original}, {"original": original_sizes(arguments.model)}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for index, (name, recipe) in enumerate(variants().items()):
            if arguments.only and name not in arguments.only:
                continue
            report = compress(arguments.model, Path(scratch) / str(index), recipe)
            errors = [entry.relative_error for entry in report.tensors]
            zeros = [entry.zero_fraction for entry in report.tensors]
            sizes[name] = {
                "bits_per_parameter": report.bits_per_parameter,
                "bits_per_expert_weight": report.expert_bits_per_weight,
                "bytes_on_disk": report.bytes_on_disk,
                "relative_error": float(np.mean(errors)),
                "zero_fraction": float(np.mean(zeros)),
            }
            for compute in arguments.compute:
                label = name if compute == "float" else f"{name}, {compute} activations"
                models[label] = load_model(report.output, dtype=torch.float32, compute=compute)
                sizes[label] = sizes[name]
        columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("evaluate", total=None)

            def sink(event: ProgressEvent) -> None:
                bar.update(task, completed=event.done, total=event.total)

            results = evaluate_all(
                models, tokens, reference=original, window=arguments.window, max_tokens=arguments.max_tokens,
                batch_size=arguments.batch_size, progress=sink,
            )  # fmt: skip
    return [{"name": name, **sizes[name], **result.to_dict()} for name, result in results.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy file of token ids")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="names of rows, to measure fewer")
    parser.add_argument(
        "--compute", nargs="+", choices=["float", "int8"], default=["float"], help="how layers multiply"
    )
    parser.add_argument("--scratch", type=Path, help="where the compressed models go for as long as this runs")
    arguments = parser.parse_args()
    rows = measure(arguments)
    used = np.load(arguments.tokens, mmap_mode="r", allow_pickle=False)[: rows[0]["windows"] * rows[0]["window"]]
    write_results(
        arguments.json,
        "quality",
        rows,
        model=arguments.model.name,
        tokens_sha256=hashlib.sha256(np.ascontiguousarray(used).tobytes()).hexdigest(),
        dtype="float32",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    for row in rows:
        print(
            f"{row['name']:28} {row['perplexity']:9.3f} {row['bits_per_parameter']:7.3f} bits/parameter",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
