"""Generating text on a CPU: compressed models, and the original in bfloat16 by transformers, token by token.

    python bench/cpu/generation.py --model novels-moe-28m --layers 8 --output bench/results/generation.json

Two models: a trained one (`--model`), and one with random weights and the layers of Qwen3-30B-A3B (hidden 2048, 128
experts of 768, top 8), as many as `--layers` says and with a vocabulary of 32,768, so that the head, which nothing
compresses, weighs against a few layers about what the real one weighs against all. Models take turns, round after
round: each is loaded, reads a prompt of 32 tokens and generates greedily. Tokens per second do not count the prompt.

For the trained model also: how many tokens are the same as those of the readable reference, the dense model in float32
with weights from the scalar decoder, for every way to compute.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from qmoe_core import Recipe, compress, load_model
from qmoe_core.generation import _Clock, set_compute
from qmoe_core.recovery.modules import make_tunable
from qmoe_core.recovery.writing import record_of
from qmoe_core.source import SourceCheckpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compression"))
from common import write_results
from large import make

FORMATS = {
    "int4 g128": Recipe.uniform("int4", 128, "rtn"),
    "int3 g128": Recipe.uniform("int3", 128, "rtn"),
    "int2 g64": Recipe.uniform("int2", 64, "rtn"),
    "ternary": Recipe.uniform("ternary"),
}
PROMPT = 32


def qwen_layers(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=layers, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=32768, tie_word_embeddings=True,
        norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def generate(model: Any, tokens: int) -> tuple[list[int], float]:
    """Ids of the new tokens, and tokens per second after the first."""
    ids = torch.randint(5, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    clock = _Clock(None)
    with torch.inference_mode():
        out = model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock, pad_token_id=0
        )
    times = clock.times[-tokens:]
    return out[0, PROMPT:].tolist(), (tokens - 1) / (times[-1] - times[0])


def contestants(source: Path, scratch: Path, formats: list[str]) -> Iterator[tuple[str, Path, float]]:
    """Name, directory and bits per expert weight of everything that takes part, the original first."""
    yield "bfloat16", source, 16.0
    for number, name in enumerate(formats):
        report = compress(source, scratch / f"{source.name}-{number}", FORMATS[name])
        yield name, Path(report.output), float(report.expert_bits_per_weight or 0)


def race(name: str, source: Path, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """All contestants of one model, in turns."""
    entries = list(contestants(source, scratch, arguments.formats))
    speeds: dict[str, list[float]] = {entry: [] for entry, _, _ in entries}
    for turn in range(arguments.rounds):
        for entry, directory, _ in entries[:: -1 if turn % 2 else 1]:
            model = load_model(directory, dtype=torch.bfloat16)
            generate(model, 4)  # layouts are made at the first token
            speeds[entry].append(generate(model, arguments.tokens)[1])
            print(name, entry, f"{speeds[entry][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
            del model
            gc.collect()
    rows = []
    for entry, _, bits in entries:
        ratios = [ours / theirs for ours, theirs in zip(speeds[entry], speeds["bfloat16"], strict=True)]
        rows.append({
            "model": name, "weights": entry, "expert_bits": bits, "tokens_per_second": statistics.median(speeds[entry]),
            "range": [min(speeds[entry]), max(speeds[entry])], "ratio": statistics.median(ratios),
        })  # fmt: skip
    return rows


def same_tokens(source: Path, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Tokens that agree with the dense model of decoded weights until the first that does not, in float32."""
    rows = []
    for number, name in enumerate(arguments.formats):
        directory = Path(compress(source, scratch / f"same-{number}", FORMATS[name]).output)
        reference = load_model(directory, dtype=torch.float32)
        with SourceCheckpoint(directory) as checkpoint:
            make_tunable(reference, lambda key, checkpoint=checkpoint: record_of(checkpoint, key))
        wanted, _ = generate(reference, arguments.tokens)
        model = load_model(directory, dtype=torch.float32)
        for compute in ("float", "stored", "int8"):
            set_compute(model, compute)
            tokens, _ = generate(model, arguments.tokens)
            different = [i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b]
            rows.append({"weights": name, "compute": compute, "tokens": len(wanted),
                         "same_until": different[0] if different else len(wanted)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained checkpoint")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="room for the checkpoints")
    parser.add_argument("--output", type=Path, default=Path("generation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        agreement = same_tokens(arguments.model, arguments, scratch)
        rows = race(arguments.model.name, arguments.model, arguments, scratch)
        if arguments.layers > 0:
            make(scratch / "qwen", qwen_layers(arguments.layers))
            name = f"{arguments.layers} layers of Qwen3-30B-A3B"
            rows += race(name, scratch / "qwen", arguments, scratch)
    for row in [*agreement, *rows]:
        print(json.dumps(row))
    write_results(arguments.output, "generation", rows, agreement=agreement, threads=arguments.threads,
                  tokens=arguments.tokens, rounds=arguments.rounds, torch=torch.__version__)  # fmt: skip


if __name__ == "__main__":
    main()
