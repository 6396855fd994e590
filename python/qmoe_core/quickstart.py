"""The whole story on the bundled model: compress in several formats, evaluate, generate, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint import compress
from .errors import QmoeError
from .evaluation import encode_text, evaluate_all
from .generation import generate, load_model, load_tokenizer
from .htmlreport import FormatRow, Report, write_report
from .progress import ProgressEvent
from .recipe import Recipe
from .source import SourceCheckpoint
from .store import io_errors, write_atomic

EXAMPLE = "novels-moe"
PROMPT = "The old house stood at the end of the lane, and"
Progress = Callable[[ProgressEvent], None]


def default_formats() -> dict[str, Recipe]:
    """What the quickstart compares: name -> recipe, from many bits to few."""
    return {
        "int8-g128": Recipe.uniform("int8", 128),
        "int4-g128": Recipe.uniform("int4", 128),
        "int3-g128": Recipe.uniform("int3", 128),
        "int2-g64": Recipe.uniform("int2", 64),
        "ternary": Recipe.uniform("ternary"),
    }


def example_directory() -> Path:
    """The bundled model: inside the installed package, or in the repository when run from there. Raises `E_MISSING`."""
    package = Path(__file__).resolve().parent
    places = (package / "examples" / EXAMPLE, package.parents[1] / "examples" / EXAMPLE)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise QmoeError("E_MISSING", "the bundled model is not installed", file=places[0])


@dataclass(frozen=True)
class QuickstartResult:
    """What was made: one row per format (the original first), and where the files are."""

    rows: tuple[FormatRow, ...]
    html: Path
    plots: tuple[Path, ...]
    json: Path
    example: Path  # one of the compressed models
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "html": str(self.html),
            "plots": [str(plot) for plot in self.plots],
            "json": str(self.json),
            "seconds": self.seconds,
        }


def quickstart(
    output: str | os.PathLike[str],
    *,
    formats: Mapping[str, Recipe] | None = None,
    max_tokens: int = 8192,
    window: int = 512,
    max_new_tokens: int = 64,
    prompt: str = PROMPT,
    progress: Progress | None = None,
) -> QuickstartResult:
    """Compresses the bundled model in several formats and reports what each of them costs.

    Args:
        output: directory for the compressed models (models/NAME) and the report. Finished models in it are used again.
        formats: name -> recipe; default `default_formats()`.
        max_tokens, window: how much of the held-out text to evaluate on, as for `evaluate`.
        max_new_tokens: how much to generate with each model.
        progress: called with a `ProgressEvent` per step; stages are "compress NAME", "evaluate", "generate", "report".

    Raises:
        QmoeError: as `compress`, `evaluate` and `generate`; `E_MISSING` without the bundled model.
    """
    started = time.monotonic()
    output, source = Path(output), example_directory()
    formats = default_formats() if formats is None else formats
    tell = progress or (lambda event: None)
    with io_errors(output):
        (output / "models").mkdir(parents=True, exist_ok=True)
    original = load_model(source, dtype=torch.float32)
    models, facts = {"original": original}, {"original": {**original_sizes(source), "errors": {}}}
    for name, recipe in formats.items():
        # One bar per format: every compression counts its bytes from zero.
        def named(event: ProgressEvent, stage: str = f"compress {name}") -> None:
            tell(replace(event, stage=stage))

        report = compress(source, output / "models" / name, recipe, progress=named)
        models[name] = load_model(report.output, dtype=torch.float32)
        facts[name] = {
            "bits_per_parameter": report.bits_per_parameter,
            "bits_per_expert_weight": report.expert_bits_per_weight or 0.0,
            "bytes_on_disk": report.bytes_on_disk,
            "packed_bytes": sum(entry.nbytes for entry in report.tensors),
            "errors": {f"{entry.module}.{entry.parameter}": entry.relative_error for entry in report.tensors},
        }
    tokenizer = load_tokenizer(source)
    tokens = encode_text(tokenizer, (source / "text" / "held_out.txt").read_text(encoding="utf-8"))
    results = evaluate_all(models, tokens, reference=original, window=window, max_tokens=max_tokens, progress=progress)
    rows = []
    for index, (name, model) in enumerate(models.items()):
        sample = generate(model, tokenizer, prompt, max_new_tokens, temperature=0.8, top_p=0.95, seed=7)
        rows.append(
            FormatRow(
                name=name, quality=results[name], tokens_per_second=sample.tokens_per_second, sample=sample.text,
                is_original=name == "original", **facts[name],
            )
        )  # fmt: skip
        tell(ProgressEvent("generate", (index + 1) * max_new_tokens, len(models) * max_new_tokens, "tokens"))
    report_files = write_report(
        output,
        Report(
            title="qmoe quickstart: novels-moe",
            model="novels-moe (Qwen3-MoE, 2.3 M parameters, trained on public-domain novels)",
            text="The Picture of Dorian Gray, preface and first chapters (kept out of training)",
            prompt=prompt,
            rows=tuple(rows),
        ),
    )
    result = QuickstartResult(
        rows=tuple(rows), html=report_files.html, plots=report_files.plots, json=output / "results.json",
        example=output / "models" / next(iter(formats)), seconds=time.monotonic() - started,
    )  # fmt: skip
    write_atomic(result.json, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    return result


def original_sizes(source: Path) -> dict[str, Any]:
    """The source's own sizes, counted like those of a compressed directory."""
    with io_errors(source):
        size = sum(entry.stat().st_size for entry in os.scandir(source) if entry.is_file())
    with SourceCheckpoint(source) as checkpoint:
        parameters = sum(tensor.elements for tensor in checkpoint.tensors.values())
        experts = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if ".experts." in name)
        expert_weights = sum(tensor.elements for name, tensor in checkpoint.tensors.items() if ".experts." in name)
    return {
        "bits_per_parameter": size * 8 / parameters,
        "bits_per_expert_weight": experts * 8 / expert_weights,
        "bytes_on_disk": size,
        "packed_bytes": experts,
    }
