"""Runs compression jobs that are killed, or whose file operations fail, and checks what is left and what a resume
makes of it.

A script of its own because it forks: torch and transformers are imported once, and each job is a forked child that
starts at the first line of `compress`, so a few hundred jobs take a minute.

    python tests/faults/jobs.py kill SOURCE WORK --points 200
    python tests/faults/jobs.py kill SOURCE WORK --points 200 --bits 19     # calibrated, formats chosen for a budget
    python tests/faults/jobs.py kill SOURCE WORK --points 200 --prune       # pruning instead of compression
    LD_PRELOAD=failio.so python tests/faults/jobs.py io SOURCE WORK --points 0     # 0: every operation

Prints one JSON object: what was done, and `problems`, empty if all is well.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import qmoe_core.checkpoint as checkpoint
from qmoe_core.allocation import Fit
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.errors import QmoeError
from qmoe_core.families import analyze
from qmoe_core.journal import DIRECTORY
from qmoe_core.recipe import Recipe
from qmoe_core.source import SourceCheckpoint
from qmoe_core.sparsify import PruneSettings, prune_checkpoint
from qmoe_core.store import TEMPORARY_SUFFIX

RECIPE = Recipe.uniform("int4", group=64)
CANDIDATES = (
    {"format": "ternary", "method": "gptq"},
    {"format": "int2", "group": 32, "method": "gptq"},
    {"format": "int4", "group": 32, "method": "gptq"},
    {"format": "keep"},
)
SHARD_BYTES = 400_000
KILLED, OK, REFUSED, CRASHED = "killed", "ok", "refused", "crashed"


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file directly in a directory."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


class Jobs:
    def __init__(self, source: Path, work: Path, bits: float | None = None, prune: bool = False) -> None:
        """`bits`: a calibrated compression within a budget; None for a data-free one. `prune`: pruning instead."""
        self.source, self.output, self.prune = source, work / "out", prune
        self.recipe: Recipe | Fit = RECIPE
        self.calibration, self.shard_bytes = None, SHARD_BYTES
        if bits is not None:
            self.recipe = Fit(bits=bits, allow=("attention",), candidates=CANDIDATES)
            ids = np.random.default_rng(0).integers(3, 96, 128)
            self.calibration = CalibrationSpec(ids, window=16, batch_size=4, buffer_bytes=0)  # all activations in files
            self.shard_bytes = 20_000
        work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        with SourceCheckpoint(source) as opened:  # imports the model's code before the first fork
            analyze(source, {name: tensor.shape for name, tensor in opened.tensors.items()})
        self.before = hashes(source)
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.wipe()
        status, told = self.wait(self.start())
        assert status == OK, f"the undisturbed job: {status} {told}"
        self.reference = hashes(self.output)

    def wipe(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def start(self, prepare: Callable[[], object] | None = None, sync_seconds: float = 2.0) -> tuple[int, int]:
        """Forks a job; returns (pid, pipe on which it tells the code of a refusal)."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, reading
        code = 0
        try:
            checkpoint.SYNC_SECONDS = sync_seconds
            if prepare is not None:
                prepare()
            if self.prune:
                prune_checkpoint(self.source, self.output, PruneSettings("magnitude", "unstructured", 0.5))
            else:
                checkpoint.compress(
                    self.source, self.output, self.recipe, calibration=self.calibration,
                    max_shard_bytes=self.shard_bytes,
                )  # fmt: skip
        except QmoeError as error:
            os.write(writing, error.code.encode())
            code = 3
        except BaseException as error:
            os.write(writing, repr(error).encode())
            code = 4
        os._exit(code)

    def wait(self, job: tuple[int, int]) -> tuple[str, str]:
        """(how the job ended, the code or message that it told)."""
        pid, reading = job
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read().decode()
        if os.WIFSIGNALED(status):
            return KILLED, told
        return {0: OK, 3: REFUSED}.get(os.WEXITSTATUS(status), CRASHED), told

    def check_interrupted(self, label: str, temporaries: bool) -> None:
        """After a job ended early: source untouched, every finished file right, nothing loadable before all is
        there."""
        if hashes(self.source) != self.before:
            self.problems.append(f"{label}: the source changed")
        if not self.output.exists():
            return
        found = hashes(self.output)
        left = [name for name in found if name.endswith(TEMPORARY_SUFFIX)]
        journal = self.output / DIRECTORY
        left += [p.name for p in journal.iterdir() if p.name.endswith(TEMPORARY_SUFFIX)] if journal.exists() else []
        if left and not temporaries:
            self.problems.append(f"{label}: temporary files left: {left}")
        for name, digest in found.items():
            if not name.endswith(TEMPORARY_SUFFIX) and digest != self.reference.get(name):
                self.problems.append(f"{label}: {name} is not what the undisturbed job writes")
        if "config.json" in found and not self.reference.keys() <= found.keys():
            self.problems.append(f"{label}: config.json is there before everything else")

    def check_resume(self, label: str) -> None:
        status, told = self.wait(self.start())
        if status != OK:
            self.problems.append(f"{label}: the resume {status}: {told}")
        elif hashes(self.output) != self.reference:
            self.problems.append(f"{label}: the resume made other files")
        elif (self.output / DIRECTORY).exists():
            self.problems.append(f"{label}: the journal is still there")


# Killing.


def kill_at_call(k: int, rng: random.Random) -> Callable[[], None]:
    """In the child: replaces the system calls that change files by ones of which the k-th kills the process, before
    it acts, after it, or for a write in the middle."""
    when = rng.choice(["before", "middle", "after"])

    def prepare() -> None:
        count = 0

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def call(*arguments: object, **keywords: object) -> object:
                nonlocal count
                count += 1
                if count != k:
                    return real(*arguments, **keywords)
                if when == "middle" and name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                elif when == "after":
                    real(*arguments, **keywords)
                os.kill(os.getpid(), signal.SIGKILL)
                return None

            setattr(os, name, call)

        for name in ("write", "pwrite", "fsync", "replace", "unlink", "rmdir", "mkdir", "ftruncate", "open"):
            wrap(name)

    return prepare


def kill_jobs(jobs: Jobs, points: int, rng: random.Random) -> None:
    jobs.wipe()
    started = time.monotonic()
    jobs.wait(jobs.start())
    duration = time.monotonic() - started
    calls = 1 << 6
    point = -1
    while jobs.counts[KILLED] < points and len(jobs.problems) < 10:
        point += 1
        jobs.wipe()
        sync = rng.choice([0.0, 0.0, 2.0])
        label = f"point {point}"
        for attempt in range(1 + (rng.random() < 0.3)):  # sometimes the resume is killed as well
            if point % 2 == 0:
                job = jobs.start(sync_seconds=sync)
                delay = rng.uniform(0, duration)
                time.sleep(delay)
                os.kill(job[0], signal.SIGKILL)
                label += f" attempt {attempt} killed after {delay * 1000:.1f} ms"
            else:
                k = rng.randrange(1, calls)
                job = jobs.start(kill_at_call(k, rng), sync_seconds=sync)
                label += f" attempt {attempt} killed at call {k}"
            status, told = jobs.wait(job)
            jobs.counts[status] += 1
            if status == OK and point % 2:
                calls = max(8, k)  # there are fewer calls than that
            elif status == KILLED and point % 2 and k > calls * 0.9:
                calls = int(calls * 1.5)
            if status not in (KILLED, OK):
                jobs.problems.append(f"{label}: {status}: {told}")
            jobs.check_interrupted(label, temporaries=True)
        if (jobs.output / DIRECTORY).exists():
            jobs.counts["left to resume"] += 1
        jobs.check_resume(label)


# Failing file operations.

FAULTS = (
    ("ENOSPC", errno.ENOSPC, 0),
    ("ENOSPC for good", errno.ENOSPC, 1),
    ("EIO", errno.EIO, 0),
    ("short write", 0, 0),
)


def io_jobs(jobs: Jobs, points: int, rng: random.Random) -> None:
    library = ctypes.CDLL(None)
    library.failio_seen.restype = ctypes.c_long

    def arm(k: int, error: int, sticky: int) -> Callable[[], None]:
        return lambda: library.failio_arm(str(jobs.output).encode(), ctypes.c_long(k), error, sticky)

    def count() -> None:
        real_exit = os._exit

        def leave(code: int) -> None:
            (jobs.output.parent / "count").write_text(str(library.failio_seen()))
            real_exit(code)

        arm(0, 0, 0)()
        os._exit = leave

    jobs.wipe()
    jobs.wait(jobs.start(count, sync_seconds=0.0))
    operations = int((jobs.output.parent / "count").read_text())
    jobs.counts["operations"] = operations
    every = range(1, operations + 1)
    for k in every if points == 0 else sorted(rng.sample(every, min(points, operations))):
        for name, error, sticky in FAULTS if points == 0 else [rng.choice(FAULTS)]:
            label = f"{name} at operation {k}"
            jobs.wipe()
            status, told = jobs.wait(jobs.start(arm(k, error, sticky), sync_seconds=0.0))
            jobs.counts[f"{name}: {status} {told}".strip()] += 1
            expected = {errno.ENOSPC: (REFUSED, "E_NO_SPACE"), errno.EIO: (REFUSED, "E_IO"), 0: (OK, "")}[error]
            if (status, told) != expected:
                jobs.problems.append(f"{label}: {status} {told}, expected {expected}")
            jobs.check_interrupted(label, temporaries=False)
            jobs.check_resume(label)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["kill", "io"])
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=float)
    parser.add_argument("--prune", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    jobs = Jobs(options.source.resolve(), options.work.resolve(), options.bits, options.prune)
    (kill_jobs if options.kind == "kill" else io_jobs)(jobs, options.points, random.Random(options.seed))
    jobs.wipe()
    result = {"kind": options.kind, "points": options.points, "seed": options.seed, "counts": dict(jobs.counts)}
    print(json.dumps({**result, "seconds": round(time.monotonic() - started, 1), "problems": jobs.problems}, indent=1))
    return 1 if jobs.problems else 0


if __name__ == "__main__":
    sys.exit(main())
