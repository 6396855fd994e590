"""Many gigabytes through calibrated compression on a small machine: memory, kill and resume, throughput.

    python bench/compression/large.py --layers 4 --scratch DIR --json bench/results/large.json
    python bench/compression/large.py --prune --layers 3 --experts 96 --scratch DIR --json bench/results/large-2.json

Makes a checkpoint with random weights and the shapes of Qwen3-235B-A22B (hidden 4096, 128 experts of 1536, top 8), as
many layers as asked (2 bytes x 2.4 G experts' weights each), runs `qmoe compress --calibration` on it (with `--prune`
`qmoe prune`) in a process of its own, kills that with SIGKILL half-way, in the middle of a layer, and runs the same
command again. `--hidden`, `--experts` and `--intermediate` make smaller ones for trying it out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

DTYPE = torch.bfloat16
POOL = 1 << 25  # normal numbers that all weights are taken from: to draw billions of them takes minutes
EXPERTS = 16  # of a shard
WRITERS = 4  # shards that are written at the same time


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file of bfloat16 tensors, written from where they are."""
    header, end = dict[str, Any](), 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def make(directory: Path, config: Qwen3MoeConfig) -> None:
    """Writes the checkpoint, some experts a shard."""
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    writers = ThreadPoolExecutor(WRITERS)
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head, width = config.head_dim, config.moe_intermediate_size
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=generator) * 0.02).to(DTYPE)

    def normal(*shape: int) -> torch.Tensor:
        """From anywhere in the pool on, and round it."""
        count, first = math.prod(shape), int(torch.randint(POOL, (), generator=generator))
        if first + count <= POOL:
            return pool[first : first + count].view(shape)
        rounds = -(-(first + count) // POOL)
        return torch.cat([pool] * rounds)[first : first + count].view(shape)

    weight_map: dict[str, str] = {}
    writing: deque[Future[None]] = deque()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        while len(writing) >= WRITERS:
            writing.popleft().result()
        writing.append(writers.submit(write_shard, directory / name, dict(tensors)))
        weight_map.update(dict.fromkeys(tensors, name))
        tensors.clear()

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}self_attn.q_proj.weight": normal(heads * head, hidden),
            f"{prefix}self_attn.k_proj.weight": normal(kv * head, hidden),
            f"{prefix}self_attn.v_proj.weight": normal(kv * head, hidden),
            f"{prefix}self_attn.o_proj.weight": normal(hidden, heads * head),
            f"{prefix}mlp.gate.weight": normal(config.num_experts, hidden),
        }
        ones = {"self_attn.q_norm": head, "self_attn.k_norm": head}
        ones |= {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        tensors |= {f"{prefix}{name}.weight": torch.ones(size, dtype=DTYPE) for name, size in ones.items()}
        for expert in range(config.num_experts):
            tensors[f"{prefix}mlp.experts.{expert}.gate_proj.weight"] = normal(width, hidden)
            tensors[f"{prefix}mlp.experts.{expert}.up_proj.weight"] = normal(width, hidden)
            tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = normal(hidden, width)
            if (expert + 1) % EXPERTS == 0:
                save(f"model-layer-{layer}-{expert // EXPERTS}.safetensors", tensors)
        if tensors:
            save(f"model-layer-{layer}-last.safetensors", tensors)
    norm = torch.ones(hidden, dtype=DTYPE)
    save(
        "model-rest.safetensors",
        {"model.embed_tokens.weight": normal(config.vocab_size, hidden), "model.norm.weight": norm},
    )
    for shard in writing:
        shard.result()
    writers.shutdown()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def accounts(pid: int) -> dict[str, int]:
    """What a process has used so far: peak resident bytes, and bytes that its system calls read and wrote; empty where
    it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in text.splitlines())
    if "VmHWM" not in fields:  # it has ended and waits to be looked at
        return {}
    return {
        "peak_rss_bytes": int(fields["VmHWM"].split()[0]) * 1024,
        "read_bytes": int(fields["rchar"]),
        "written_bytes": int(fields["wchar"]),
    }


def run(command: list[str], kill_at: float | None, journal: Path, layers: int) -> dict[str, Any]:
    """Runs the command, or kills it once `kill_at` of the layers are done: so many whole ones are in the journal, and
    the rest of the time that a layer took has passed. What it uses is sampled."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    used: dict[str, int] = {}
    kill_time = math.inf
    while process.poll() is None:
        used = accounts(process.pid) or used
        if kill_at is not None:
            whole, rest = divmod(kill_at * layers, 1)
            done = [*journal.glob("record-*"), *journal.glob("mask-*")]
            if len(done) >= 2 * whole:  # gate and up, and down
                now = time.monotonic()
                kill_time, kill_at = now + rest * (now - started) / max(whole, 1), None
        if time.monotonic() >= kill_time:
            process.send_signal(signal.SIGKILL)
            kill_time = math.inf
        time.sleep(0.2)
    reader.join()
    report = json.loads(output[0]) if process.returncode == 0 else {}
    return {"returncode": process.returncode, "seconds": time.monotonic() - started, **used, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="room for the checkpoint, its result and the journal"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kill-at", type=float, default=0.5)
    parser.add_argument("--prune", action="store_true", help="qmoe prune instead of qmoe compress")
    parser.add_argument("options", nargs="*", help="more options of the command, after --")
    arguments = parser.parse_args()
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, num_experts=arguments.experts,
        num_experts_per_tok=8, moe_intermediate_size=arguments.intermediate, num_attention_heads=64,
        num_key_value_heads=4, head_dim=128, vocab_size=arguments.vocabulary, tie_word_embeddings=True,
        norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    source, output = arguments.scratch / "source", arguments.scratch / "output"
    # In a process of its own: this one stays small beside the one that is measured.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(source, config))
    maker.start()
    maker.join()
    if maker.exitcode != 0:
        raise SystemExit(f"making the checkpoint: exit code {maker.exitcode}")
    nbytes = size_of(source)
    tokens = np.random.default_rng(0).integers(0, arguments.vocabulary, arguments.tokens)
    np.save(arguments.scratch / "tokens.npy", tokens)
    job = "prune" if arguments.prune else "compress"
    command = [
        sys.executable, "-m", "qmoe_core", job, str(source), "-o", str(output), "--json",
        "--calibration", str(arguments.scratch / "tokens.npy"), "--calibration-tokens", str(arguments.tokens),
        *arguments.options,
    ]  # fmt: skip
    journal, load = output / ".qmoe-journal", os.getloadavg()
    killed = run(command, arguments.kill_at, journal, arguments.layers)
    finished = run(command, None, journal, arguments.layers)
    if finished["returncode"] != 0 or killed["returncode"] != -signal.SIGKILL:
        raise SystemExit(f"killed run: {killed['returncode']}, second run: {finished['returncode']}")
    baseline = finished["report"]["start_rss_bytes"]
    rows = [
        {
            "name": name,
            **{key: part[key] for key in ("seconds", "peak_rss_bytes", "read_bytes", "written_bytes")},
            "peak_beyond_torch_bytes": part["peak_rss_bytes"] - baseline,
            "read_mb_per_second": part["read_bytes"] / part["seconds"] / 1e6,
            "written_mb_per_second": part["written_bytes"] / part["seconds"] / 1e6,
        }
        for name, part in (("until SIGKILL", killed), ("the same command again", finished))
    ]
    left_out = ("output", "tensors", "files", "recipe")
    report = {key: value for key, value in finished["report"].items() if key not in left_out}
    write_results(
        arguments.json, "large", rows, source_bytes=nbytes, output_bytes=size_of(output), config=config.to_dict(),
        options=arguments.options, job=job, tokens=arguments.tokens, threads=torch.get_num_threads(),
        load_average_before=load, report=report,
    )  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
