"""Where a kernel's warps spend their time: Nsight Compute's samples by instruction, put together by stretches of code
that are executed equally often, which loops and what is between them are.

    python bench/gpu/profile.py KERNEL [--skip N] [--csv FILE] [--instructions BEGIN END] -- COMMAND ...
    python bench/gpu/profile.py expand_streams -- python bench/gpu/ternary.py --zeros 0.885

KERNEL is a regular expression; of the launches that it fits, the one behind the first N is profiled, alone on the
device, at fixed clocks and with cold caches: shares mean more than times. `ncu` must be in the PATH, and performance
counters allowed. `--csv` keeps the page that this reads, or has it where there is no COMMAND. Columns: number of the
first and behind the last instruction, how often warps execute one, share of all samples, most frequent reasons for
waiting, and what accesses to shared memory take, of the least that they could.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SECTIONS = ("SourceCounters", "SpeedOfLight", "WarpStateStats", "SchedulerStats")
SAMPLES, EXECUTED = "Warp Stall Sampling (All Samples)", "Instructions Executed"
WAVES, IDEAL = "L1 Wavefronts Shared", "L1 Wavefronts Shared Ideal"


def ncu(*arguments: str) -> str:
    """What it prints; ends this program with that where it fails."""
    try:
        done = subprocess.run(["ncu", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("profile.py: there is no ncu in the PATH")
    if done.returncode != 0:
        sys.exit(f"profile.py: ncu failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def profile(kernel: str, skip: int, command: list[str]) -> str:
    """The page of instructions, as comma-separated values; what else was measured is printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        sections = itertools.chain.from_iterable(("--section", section) for section in SECTIONS)
        which = ("--kernel-name", f"regex:{kernel}", "--launch-skip", str(skip), "--launch-count", "1")
        ncu(*which, *sections, "--import-source", "no", "--export", str(report), *command)
        if not report.exists():
            sys.exit(f"profile.py: no launch of a kernel like {kernel!r} was profiled")
        print(ncu("--import", str(report)))
        return ncu("--import", str(report), "--page", "source", "--csv")


def number(row: dict[str, str], column: str) -> int:
    value = row[column]
    return int(value) if value.isdigit() else 0


def reasons(rows: list[dict[str, str]], most: int) -> str:
    """What the samples of instructions waited for."""
    stalls: Counter[str] = Counter()
    for row in rows:
        for column in row:
            if column.startswith("stall_") and not column.endswith("(Not Issued)"):
                stalls[column.removeprefix("stall_")] += number(row, column)
    total = sum(stalls.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in stalls.most_common(most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--least", type=float, default=0.01, help="share of samples that a stretch must have")
    parser.add_argument("--instructions", type=int, nargs=2, metavar=("BEGIN", "END"))
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    if arguments.command:
        page = profile(arguments.kernel, arguments.skip, arguments.command)
        if arguments.csv:
            arguments.csv.write_text(page)
    elif arguments.csv:
        page = arguments.csv.read_text()
    else:
        sys.exit("profile.py: neither a command to profile nor a page to read")
    lines = page.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"Address"')), None)
    if begin is None:
        sys.exit("profile.py: this is not a page of instructions")
    rows = list(csv.DictReader(lines[begin:]))
    samples = sum(number(row, SAMPLES) for row in rows) or 1
    if arguments.instructions:
        for i in range(*arguments.instructions):
            row = rows[i]
            share = number(row, SAMPLES) / samples
            print(f"{i:5} {share:6.2%} {number(row, EXECUTED):9}  {row['Source'].strip():72} {reasons([row], 3)}")
        return
    at = 0
    for executed, stretch in itertools.groupby(rows, key=lambda row: number(row, EXECUTED)):
        group = list(stretch)
        own = sum(number(row, SAMPLES) for row in group)
        if own >= arguments.least * samples:
            ideal = sum(number(row, IDEAL) for row in group)
            waves = f"; shared memory {sum(number(row, WAVES) for row in group) / ideal:.1f}x" if ideal else ""
            print(f"{at:6}{at + len(group):6} {executed:10} times {own / samples:6.1%}  {reasons(group, 4)}{waves}")
        at += len(group)


if __name__ == "__main__":
    main()
