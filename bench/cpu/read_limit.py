"""What one token gets of the memory: our kernels beside plain reads, which take turns with them.

    python bench/cpu/read_limit.py build-bench/bench/cpu/bench_kernels --output bench/results/cpu-read-limit.json

Every product is followed at once by a read of as many cold bytes on as many threads (reading.h), so that other work on
the machine, and whatever else changes what memory delivers, meets both alike; a share is the median of the ratios. That
holds on a busy machine too, unlike rates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

KINDS = ("int8_g128", "int4_g128", "int3_g128", "int2_g128", "ternary")
COUNTERS = ("weights", "stored_bytes", "read_limit", "share_of_read_limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    command = [
        str(arguments.program), "--benchmark_format=json", "--benchmark_min_time=0.2",
        f"--benchmark_repetitions={arguments.repetitions}",
        f"--benchmark_filter=^(linear|layer)/({'|'.join(KINDS)})/.*/tokens:1/",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    cells: dict[tuple[str, str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in report["benchmarks"]:
        if entry["run_type"] != "iteration":
            continue
        shape, kind, _, _, threads, *_ = entry["name"].split("/")
        for counter in COUNTERS:
            cells[shape, kind, int(threads.partition(":")[2])][counter].append(entry[counter])
    rows: list[dict[str, Any]] = []
    for (shape, kind, threads), values in cells.items():
        shares = values["share_of_read_limit"]
        rows.append({
            "shape": shape, "kind": kind, "threads": threads,
            **{counter: statistics.median(values[counter]) for counter in COUNTERS},
            "share_range": [min(shares), max(shares)],
        })  # fmt: skip
        print(json.dumps(rows[-1]))
    if arguments.output is not None:
        write_results(
            arguments.output, "cpu-read-limit", rows, repetitions=arguments.repetitions, load_average_before=load,
            isa=report["context"]["isa"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
