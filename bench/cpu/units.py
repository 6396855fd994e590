"""The generator's performance model beside what its kernels take: cycles per line of packed codes.

    python bench/cpu/units.py build-bench/bench/cpu/bench_units --core "zen 4" --output bench/results/cpu-model.json

Weights and activations stay in the second-level cache. `--core` names the processor whose costs the prediction uses
(cpp/codegen/isa.py); the choices of tiles that are compiled in are those for the instruction set as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cpp"))
from codegen.isa import CORES, ISAS, on_core
from codegen.model import STEP_LINES, STEP_QUADS, choose_direct, choose_tile, direct_cycles, tile_cycles
from common import write_results

KINDS = {"int2_g128": "int2", "int3_g128": "int3", "int4_g128": "int4", "int8_g128": "int8"}


def predict(isa: str, core: str, codes: str, way: str, tokens: int) -> float:
    """Cycles per line of packed codes, of all tokens."""
    costs = on_core(ISAS[isa], core)
    if way == "packed":
        return direct_cycles(costs, codes, tokens, choose_direct(ISAS[isa], codes, tokens))
    quads = STEP_QUADS[codes] / STEP_LINES[codes]  # lines of unpacked codes per line of packed ones
    return tile_cycles(costs, False, choose_tile(ISAS[isa], False)) * tokens * quads


def measure(program: Path) -> tuple[dict[str, float], float, str]:
    """Lines per second by kind, way and tokens; the clock in cycles per second; the instruction set."""
    pattern = f"^(clock|unit/({'|'.join(KINDS)})/.*)$"
    command = [str(program), "--benchmark_format=json", "--benchmark_min_time=0.1", f"--benchmark_filter={pattern}"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rates = {entry["name"]: entry.get("lines") or entry["cycles"] for entry in report["benchmarks"]}
    clock = rates.pop("clock")
    return rates, clock, report["context"]["isa"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--core", choices=list(CORES), required=True)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    # The fastest of all repetitions, of the clock too: what else runs can only take from either, and a virtual core
    # that shares its own with another one has half of the units and counts its cycles all the same.
    lines: dict[str, list[float]] = defaultdict(list)
    clocks: list[float] = []
    for _ in range(arguments.repetitions):
        rates, clock, isa = measure(arguments.program)
        if isa not in ISAS:
            parser.error(f"there is no model of {isa}: pin another with QMOE_FORCE_ISA")
        clocks.append(clock)
        for name, rate in rates.items():
            lines[name].append(rate)
    rows: list[dict[str, Any]] = []
    for name, values in ((name, [max(clocks) / rate for rate in rates]) for name, rates in lines.items()):
        _, kind, way, tokens = name.split("/")
        count = int(tokens.partition(":")[2])
        rows.append({
            "kind": kind, "way": way, "tokens": count, "cycles": min(values),
            "range": [min(values), max(values)], "predicted": predict(isa, arguments.core, KINDS[kind], way, count),
        })  # fmt: skip
        print(json.dumps(rows[-1]))
    if arguments.output is not None:
        write_results(arguments.output, "cpu-model", rows, isa=isa, core=arguments.core)


if __name__ == "__main__":
    main()
