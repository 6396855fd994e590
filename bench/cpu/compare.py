"""Our CPU kernels beside llama.cpp's and the machine's limits, measured in turns.

    python bench/cpu/compare.py build-bench/bench/cpu --output bench/results/cpu-kernels.json

The folder holds bench_limits, bench_ggml and bench_kernels (README.md says how they are built). Machines are shared and
their speed drifts, so nothing is compared over a distance: the kinds of a family (4-bit, say) and their rivals run one
right after the other, then comes the next family, and all of it is repeated, every other time in reverse order. A ratio
is the median of the ratios within the repetitions. A rival's cell is that of its fastest buffer type. The read limit is
measured between our own products of one token (reading.h).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # ours, rivals
    "4-bit": (("int4_g128", "int4_g64"), ("q4_0", "q4_K")),
    "8-bit": (("int8_g128", "int8_g64"), ("q8_0",)),
    "3-bit": (("int3_g128", "int3_g64"), ("q3_K", "iq3_xxs")),
    "2-bit": (("int2_g128", "int2_g64"), ("q2_K", "iq2_xxs")),
    "ternary": (("ternary", "ternary_z885"), ("tq1_0", "tq2_0")),
}
SHAPES = ("linear", "experts_up", "experts_down", "layer")
LAYER = {"experts_up": 2, "experts_down": 1}  # what the rival's time for a layer is made of
CELL = re.compile(r"(?P<shape>\w+)/(?P<type>\w+)/(?P<buffer>\w+)/tokens:(?P<tokens>\d+)/threads:(?P<threads>\d+)/")
LIMIT = re.compile(r"(?P<name>\w+)/(?:.*/)?threads:(?P<threads>\d+)$")


@dataclass(frozen=True)
class Cell:
    """What one rate belongs to. `type` is a kind of ours or a type of ggml's."""

    shape: str
    type: str
    tokens: int
    threads: int


@dataclass
class Repetition:
    """What was measured in one turn of one family."""

    rates: dict[Cell, dict[str, dict[str, float]]] = field(default_factory=lambda: defaultdict(dict))  # per buffer
    limits: dict[tuple[str, int], float] = field(default_factory=dict)  # (what, threads), per second


def run(program: Path, pattern: str, min_time: float) -> dict[str, Any]:
    """One run of a google-benchmark program, as it reports it. Raises RuntimeError if it or a cell of it fails."""
    arguments = [str(program), "--benchmark_format=json", f"--benchmark_min_time={min_time}"]
    result = subprocess.run([*arguments, f"--benchmark_filter={pattern}"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{program.name} on {pattern}: exit status {result.returncode}: {result.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def measure_limits(program: Path, pattern: str, min_time: float, into: Repetition) -> None:
    """The fastest variant (streams, prefetch distance) of every limit, in bytes or operations per second."""
    for entry in run(program, pattern, min_time)["benchmarks"]:
        match = LIMIT.match(entry["name"])
        assert match is not None, entry["name"]
        key = match["name"], int(match["threads"])
        rate = entry.get("bytes_per_second") or entry["operations"]
        into.limits[key] = max(into.limits.get(key, 0.0), rate)


def measure_cells(program: Path, types: list[str], args: argparse.Namespace, into: Repetition) -> dict[str, str]:
    """The rates of all asked-for cells of `types`. Returns the program's context."""
    choices = ["|".join(map(str, values)) for values in (args.shapes, types, args.tokens, args.threads)]
    # cells of a shape that one side does not have simply do not match
    pattern = "^({})/({})/.*/tokens:({})/threads:({})/".format(*choices)
    report = run(program, pattern, args.min_time)
    for entry in report["benchmarks"]:
        match = CELL.match(entry["name"])
        assert match is not None, entry["name"]
        cell = Cell(match["shape"], match["type"], int(match["tokens"]), int(match["threads"]))
        counters = "flops", "weights", "stored_bytes", "read_limit", "share_of_read_limit"
        into.rates[cell][match["buffer"]] = {name: entry[name] for name in counters if name in entry}
    context: dict[str, str] = report["context"]
    return context


def summary(repetitions: list[Repetition], cell: Cell, buffer: str) -> dict[str, Any]:
    rates = [repetition.rates[cell][buffer] for repetition in repetitions]
    flops = [rate["flops"] / 1e9 for rate in rates]
    return {
        "gigaflops": round(statistics.median(flops), 3),
        "gigaflops_range": [round(min(flops), 3), round(max(flops), 3)],
        "weights_per_second": round(statistics.median(rate["weights"] for rate in rates)),
        "gigabytes_per_second": round(statistics.median(rate["stored_bytes"] for rate in rates) / 1e9, 3),
    }


def share_of_limit(repetitions: list[Repetition], cell: Cell, buffer: str) -> float:
    """As measured between the products themselves; of a rival, whose program knows no limit, with what ours read in the
    same turn."""
    shares = []
    for repetition in repetitions:
        rate = repetition.rates[cell][buffer]
        ours = next(c for c in repetition.rates if "ours" in repetition.rates[c] and same_place(c, cell))
        limit = repetition.rates[ours]["ours"]["read_limit"]
        shares.append(rate.get("share_of_read_limit") or rate["stored_bytes"] / limit)
    return round(statistics.median(shares), 4)


def same_place(one: Cell, other: Cell) -> bool:
    return (one.shape, one.tokens, one.threads) == (other.shape, other.tokens, other.threads)


def add_layers(repetition: Repetition) -> None:
    """The rival's layers: no call of its own, so the products alone, each from its fastest buffer type."""
    ours = [cell for cell, buffers in repetition.rates.items() if cell.shape == "layer" and "ours" in buffers]
    rivals = {cell.type for cell, buffers in repetition.rates.items() if "ours" not in buffers}
    for cell in ours:
        for rival in rivals:
            total: dict[str, float] = defaultdict(float)
            seconds = 0.0
            for shape, count in LAYER.items():
                buffers = repetition.rates[Cell(shape, rival, cell.tokens, cell.threads)]
                best = max(buffers.values(), key=lambda rate: rate["flops"])
                work = 2.0 * 768 * 2048 * 8 * cell.tokens * count
                seconds += work / best["flops"]
                for name in ("flops", "weights", "stored_bytes"):
                    total[name] += work / best["flops"] * best[name]
            layer = Cell("layer", rival, cell.tokens, cell.threads)
            repetition.rates[layer]["products"] = {name: value / seconds for name, value in total.items()}


def compare(repetitions: list[Repetition], kinds: list[str], rivals: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for every cell of ours and every rival of the family."""
    rows = []
    for cell in repetitions[0].rates:
        if cell.type not in kinds:
            continue
        for rival in rivals:
            other = Cell(cell.shape, rival, cell.tokens, cell.threads)
            buffers = {name: summary(repetitions, other, name) for name in repetitions[0].rates[other]}
            best = max(buffers, key=lambda name: float(buffers[name]["gigaflops"]))
            ratios = [r.rates[cell]["ours"]["flops"] / r.rates[other][best]["flops"] for r in repetitions]
            row: dict[str, Any] = {"shape": cell.shape, "tokens": cell.tokens, "threads": cell.threads}
            row |= {"kind": cell.type, "rival": rival, "rival_buffer": best}
            row |= {"ratio": round(statistics.median(ratios), 3)}
            row |= {"ratio_range": [round(min(ratios), 3), round(max(ratios), 3)]}
            row |= {"ours": summary(repetitions, cell, "ours"), "theirs": buffers[best]}
            if cell.tokens == 1:  # more tokens read no more weights, and then reading is not the limit
                row["ours"]["share_of_read_limit"] = share_of_limit(repetitions, cell, "ours")
                row["theirs"]["share_of_read_limit"] = share_of_limit(repetitions, other, best)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="the folder with bench_limits, bench_ggml and bench_kernels")
    names = [kind for kinds, _ in FAMILIES.values() for kind in kinds]
    default = ["int4_g128", "int8_g128", "int3_g128", "int2_g128", "ternary"]
    parser.add_argument("--kinds", nargs="+", choices=names, default=default)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--threads", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds a cell is measured at least")
    parser.add_argument(
        "--busy", action="store_true", help="measure although other work runs: to try it, not to publish"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    programs = {name: args.programs / f"bench_{name}" for name in ("limits", "ggml", "kernels")}
    if missing := [path.name for path in programs.values() if not path.is_file()]:
        parser.error(f"{args.programs} has no {', '.join(missing)}: see bench/cpu/README.md")

    load = [round(x, 2) for x in os.getloadavg()]
    if load[0] > (os.cpu_count() or 1) / 4 and not args.busy:
        # ggml's threads spin for each other: on a busy machine two can be slower than one, which would flatter us.
        parser.error(f"the load average is {load[0]}: wait until the machine is idle, or say --busy")
    work = {
        name: ([kind for kind in kinds if kind in args.kinds], rivals) for name, (kinds, rivals) in FAMILIES.items()
    }
    work = {name: (kinds, rivals) for name, (kinds, rivals) in work.items() if kinds}
    turns: dict[str, list[Repetition]] = {name: [] for name in work}
    everything = Repetition()  # the arithmetic, once
    measure_limits(programs["limits"], "vpdpbusd|fma|amx", args.min_time, everything)
    contexts: dict[str, dict[str, str]] = {}
    for number in range(args.repetitions):
        for name in list(work)[:: -1 if number % 2 else 1]:
            print(f"repetition {number + 1} of {args.repetitions}: {name}", file=sys.stderr)
            kinds, rivals = work[name]
            turn = Repetition()
            contestants = [("ggml", list(rivals)), ("kernels", kinds)]
            for program, types in contestants[:: -1 if number % 2 else 1]:
                contexts[program] = measure_cells(programs[program], types, args, turn)
            add_layers(turn)
            turns[name].append(turn)

    limits = {f"{what}/threads:{threads}": round(rate / 1e9, 2) for (what, threads), rate in everything.limits.items()}
    for threads in args.threads:
        reads = [
            rate["read_limit"]
            for repetitions in turns.values()
            for turn in repetitions
            for cell, buffers in turn.rates.items()
            for rate in buffers.values()
            if cell.threads == threads and "read_limit" in rate
        ]
        if reads:
            limits[f"dram_read/threads:{threads}"] = round(statistics.median(reads) / 1e9, 2)
    rows = [row for name, (kinds, rivals) in work.items() for row in compare(turns[name], kinds, rivals)]
    for row in rows:
        print(json.dumps(row))
    if args.output is not None:
        write_results(
            args.output,
            "cpu-kernels",
            rows,
            repetitions=args.repetitions,
            isa=contexts["kernels"]["isa"],
            ggml=contexts["ggml"]["ggml"],
            load_average_before=load,
            limits_giga_per_second=limits,
        )


if __name__ == "__main__":
    main()
