"""Runs the google-benchmark programs and writes their medians and spread as JSON.

cmake -S . -B build-bench -DQMOE_BENCH=ON && cmake --build build-bench
python bench/cpu/record.py build-bench/bench/cpu/bench_codec --output bench/results/codec.json
python bench/cpu/record.py build-bench/bench/cpu/bench_ternary_codes --output bench/results/ternary-codes.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

STANDARD = {"name", "run_name", "run_type", "repetitions", "repetition_index", "threads", "iterations", "real_time"}
STANDARD |= {"cpu_time", "time_unit", "family_index", "per_family_instance_index", "items_per_second"}


def run(program: Path, repetitions: int) -> list[dict[str, Any]]:
    """One row per benchmark: weights per second (median, lowest, highest of the repetitions) and its counters."""
    arguments = [
        str(program),
        "--benchmark_format=json",
        f"--benchmark_repetitions={repetitions}",
        "--benchmark_min_time=0.2",
    ]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(output)["benchmarks"]:
        if entry.get("error_occurred"):
            raise RuntimeError(f"{entry['name']}: {entry['error_message']}")
        if entry["run_type"] == "iteration":
            runs.setdefault(entry["run_name"], []).append(entry)
    rows = []
    for name, entries in runs.items():
        speeds = sorted(entry["items_per_second"] for entry in entries)
        benchmark, *parameters = name.split("/")
        row: dict[str, Any] = {"name": benchmark}
        row |= {key: int(value) for key, value in (p.split(":") for p in parameters if re.fullmatch(r"\w+:\d+", p))}
        row |= {key: value for key, value in entries[0].items() if key not in STANDARD}
        row["weights_per_second"] = statistics.median(speeds)
        row["weights_per_second_range"] = [speeds[0], speeds[-1]]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    rows = run(arguments.program, arguments.repetitions)
    write_results(arguments.output, arguments.output.stem, rows, repetitions=arguments.repetitions, threads=1)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
