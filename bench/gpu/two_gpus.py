"""Calibrated compression on one GPU and on several: seconds, speedup, and whether the results agree.

    python bench/gpu/two_gpus.py [--processes 1 2] [--output FILE]

Makes a checkpoint with random weights and layers like those of Qwen3-30B-A3B in a temporary folder and compresses it
with as many calibration tokens as `qmoe compress` takes, alone and under torchrun, each time in processes of their own.
Activations are kept in memory, whatever their size. Seconds are those of the compression itself, in processes that have
met and whose CUDA is up, NCCL's start included; `wall_seconds` are all, from the start of Python on. `ends`: when every
layer was done; `layer_seconds`: the median time from one to the next. `--device cpu` and smaller numbers try it out.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig

from qmoe_core import Recipe, compress
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.progress import ProgressEvent

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compression"))
from common import processor, write_results
from large import make, size_of


def work(source: Path, output: Path, arguments: argparse.Namespace) -> None:
    """One process's part of a compression; the first one prints the result as JSON."""
    rank, ends = int(os.environ.get("RANK", "0")), dict[str, float]()

    def progress(event: ProgressEvent) -> None:
        if re.fullmatch(r".*layers\.\d+", event.detail):
            ends[event.detail] = time.monotonic()

    spec = CalibrationSpec(source.parent / "tokens.npy", max_tokens=arguments.tokens, buffer_bytes=1 << 40)
    recipe = Recipe.uniform(arguments.format, method="gptq")
    if arguments.device == "cuda":
        torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        dist.barrier()
    profile, begin = cProfile.Profile(), time.monotonic()
    if arguments.profile:
        profile.enable()
    report = compress(source, output, recipe, calibration=spec, device=arguments.device, progress=progress)
    if arguments.profile:
        profile.disable()
        arguments.profile.mkdir(parents=True, exist_ok=True)
        with open(arguments.profile / f"{output.name}-{rank}.txt", "w") as file:
            for order in ("tottime", "cumtime"):
                pstats.Stats(profile, stream=file).sort_stats(order).print_stats(70)
    if rank == 0:
        errors = [entry.relative_output_error for entry in report.tensors]
        result = {
            "seconds": report.seconds,
            "layer_seconds": median(b - a for a, b in itertools.pairwise(ends.values())) if len(ends) > 1 else None,
            "ends": [round(end - begin, 3) for end in ends.values()],
            "bits_per_parameter": report.bits_per_parameter,
            "mean_relative_output_error": mean(error for error in errors if error is not None),
        }
        print(json.dumps(result), flush=True)
    if "RANK" in os.environ:
        dist.destroy_process_group()


def run(processes: int, source: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One compression. Threads are divided among the processes: torchrun alone would give each of them one."""
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))}
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1"]
    if processes == 1:
        launcher = []
    command = [
        sys.executable, *launcher, __file__, "--work", str(source), str(output), "--format", arguments.format,
        "--tokens", str(arguments.tokens), "--device", arguments.device,
    ]  # fmt: skip
    if arguments.profile:
        command += ["--profile", str(arguments.profile.resolve())]
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.monotonic() - begin
    if done.returncode != 0:
        raise SystemExit(f"{processes} processes: exit status {done.returncode}\n{done.stdout}")
    return {"processes": processes, "tokens": arguments.tokens, "wall_seconds": wall, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("two-gpus.json"))
    parser.add_argument("--format", default="int4")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--profile", type=Path, help="a folder for profiles of every process")
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)  # one of the processes
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments)
        return
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, num_experts=arguments.experts,
        num_experts_per_tok=8, moe_intermediate_size=arguments.intermediate, num_attention_heads=32,
        num_key_value_heads=4, head_dim=arguments.hidden // 32, vocab_size=32768, tie_word_embeddings=True,
        norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make(scratch / "source", config)
        np.save(scratch / "tokens.npy", np.random.default_rng(0).integers(0, config.vocab_size, arguments.tokens))
        nbytes = size_of(scratch / "source")
        rows: list[dict[str, Any]] = []
        for processes in arguments.processes:
            os.sync()  # what is still to be written would be written during the run
            row = run(processes, scratch / "source", scratch / f"of-{processes}", arguments)
            rows.append(row | {"speedup": (rows[0] if rows else row)["seconds"] / row["seconds"]})
            print(json.dumps(rows[-1]), flush=True)
    device = processor()
    if arguments.device == "cuda":
        device = f"{max(arguments.processes)} x {torch.cuda.get_device_name()}, {device}"
    write_results(arguments.output, "two-gpus", rows, device, source_bytes=nbytes, format=arguments.format,
                  torch=torch.__version__, shape=[arguments.layers, arguments.experts, arguments.hidden,
                                                  arguments.intermediate])  # fmt: skip


if __name__ == "__main__":
    main()
