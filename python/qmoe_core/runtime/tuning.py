"""What the CPU kernels are tuned to on a machine: measured once by `qmoe tune`, read by every later process.

Tuning changes how fast products are, never their results.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C
from ..errors import QmoeError
from ..formats import IntFormat, IntMatrix, PackedTensor

VERSION = 1
PREFETCH = (0, 256, 512, 1024, 2048, 4096)
DIRECT_TOKENS = (4, 8, 16, 32, 128, 1024)
SHAPE = (4096, 4096)  # 8 MiB in 4 bits: a few of them in turn are colder than any cache is large


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        values: `{"prefetch": bytes ahead, "direct_tokens": tokens}`, see qmoe/prepacked.h.
        trials: `{"prefetch": {value: seconds of one token}, "direct_tokens": {tokens: time of reading packed lines over
            that of unpacked codes}}`, medians.
        path: where it is kept.
    """

    values: dict[str, int]
    trials: dict[str, dict[int, float]]
    path: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cache_path() -> Path:
    """`$QMOE_TUNING` or `$XDG_CACHE_HOME/qmoe/tuning.json`."""
    if path := os.environ.get("QMOE_TUNING"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmoe" / "tuning.json"


def machine() -> str:
    """What tuned values belong to: the processor, and the kernels that it runs."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    forced = os.environ.get("QMOE_FORCE_ISA")
    return f"{name}, {forced or ' '.join(_C.cpu_features())}, {_C.version()}"


def load() -> bool:
    """Take over what `tune` found on this machine; False where there is nothing. A file that is damaged is as good as
    none: everything works without it."""
    try:
        values = json.loads(cache_path().read_text())["machines"][machine()]
        _C.set_tuning(int(values["prefetch"]), int(values["direct_tokens"]))
    except (OSError, ValueError, KeyError, TypeError, QmoeError):
        return False
    return True


def save(values: dict[str, int]) -> Path:
    """Keep values for this machine; those of others stay. The file appears whole or not at all."""
    path = cache_path()
    try:
        known = json.loads(path.read_text())["machines"]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    text = json.dumps({"version": VERSION, "machines": {**known, machine(): values}}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
    return path


def tune(
    threads: int = 0, seconds: float = 0.2, progress: Callable[[str], None] | None = None, keep: bool = True
) -> TuneResult:
    """Measure prefetch distances at one token and the crossover to unpacked codes, int4 in groups of 128.

    Args:
        threads: 0 takes all that may be used.
        seconds: how long each candidate is measured at least.
        progress: told what is being measured.
        keep: write the result to `cache_path`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    rows, columns = SHAPE
    generator = np.random.default_rng(0)
    format = IntFormat(4, 128)
    groups = columns // 128
    matrix = IntMatrix(
        format,
        generator.integers(0, 16, SHAPE, dtype=np.uint8),
        np.full((rows, groups), 1 / 64, dtype=np.float32),
        np.full((rows, groups), 8, dtype=np.uint8),
    )
    record = PackedTensor.pack([matrix]).data
    nbytes = _C.prepack_size(record.ctypes.data, record.size, "plain")
    copies = []
    for _ in range(16):
        memory = np.empty(nbytes + 63, dtype=np.uint8)
        layout = memory[-memory.ctypes.data % 64 :][:nbytes]
        _C.prepack(record.ctypes.data, record.size, "plain", layout.ctypes.data, nbytes, threads)
        copies.append(layout)
    turns = itertools.cycle(copies)

    def measure(tokens: int) -> float:
        x = generator.standard_normal((tokens, columns), dtype=np.float32)
        y, offsets = np.empty((tokens, rows), dtype=np.float32), np.array([0, tokens])
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begin < seconds:
            layout, started = next(turns), time.perf_counter()
            _C.prepacked_linear(
                layout.ctypes.data, nbytes, offsets.ctypes.data, 2, x.ctypes.data, "float32", tokens, columns,
                y.ctypes.data, rows, "int8", threads,
            )  # fmt: skip
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    before = _C.tuning()
    trials: dict[str, dict[int, float]] = {"prefetch": {}, "direct_tokens": {}}
    try:
        for distance in PREFETCH:
            if progress:
                progress(f"prefetch {distance} bytes ahead")
            _C.set_tuning(distance, before["direct_tokens"])
            trials["prefetch"][distance] = measure(1)
        prefetch = min(trials["prefetch"], key=lambda d: trials["prefetch"][d])
        # Up to how many tokens reading packed lines is the faster way: the last size at which it is.
        direct = DIRECT_TOKENS[0]
        for tokens in DIRECT_TOKENS:
            if progress:
                progress(f"{tokens} tokens, packed and unpacked")
            _C.set_tuning(prefetch, tokens)
            packed = measure(tokens)
            _C.set_tuning(prefetch, tokens - 1)
            unpacked = measure(tokens)
            trials["direct_tokens"][tokens] = packed / unpacked
            if packed > unpacked:
                break
            direct = tokens
    finally:
        _C.set_tuning(before["prefetch"], before["direct_tokens"])
    values = {"prefetch": prefetch, "direct_tokens": direct}
    _C.set_tuning(**values)
    return TuneResult(values, trials, str(save(values)) if keep else "")
