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
from numpy.typing import NDArray

from .. import _C
from ..errors import QmoeError
from ..formats import IntFormat, IntMatrix, PackedTensor

VERSION = 3
PREFETCH = (0, 1024, 2048, 4096, 8192, 16384)  # into the second-level cache
NEAR = (64, 128, 192, 256, 384, 1024, 2048, 3072)  # into the first
DIRECT_TOKENS = (4, 8, 16, 32, 128, 1024)
SHAPE = (4096, 4096)  # 8 MiB in 4 bits: a few of them in turn are colder than any cache is large


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        values: `{"prefetch_narrow": bytes ahead, "prefetch_wide": bytes ahead, "near_narrow": bytes ahead,
            "near_wide": bytes ahead, "direct_tokens": tokens}`, see qmoe/prepacked.h.
        trials: `{"prefetch_narrow": {value: seconds of one token}, "prefetch_wide", "near_narrow", "near_wide": the
            same, "direct_tokens": {tokens: time of reading packed lines over that of unpacked codes}}`, medians.
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
        _C.set_tuning(**{name: int(values[name]) for name in _C.tuning()})
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


def _copies(bits: int, generator: np.random.Generator, threads: int) -> list[NDArray[np.uint8]]:
    """A matrix, prepacked, so many times that it is cold in the caches when its turn comes."""
    groups = SHAPE[1] // 128
    matrix = IntMatrix(
        IntFormat(bits, 128),
        generator.integers(0, 2**bits, SHAPE, dtype=np.uint8),
        np.full((SHAPE[0], groups), 1 / 64, dtype=np.float32),
        np.full((SHAPE[0], groups), 2 ** (bits - 1), dtype=np.uint8),
    )
    record = PackedTensor.pack([matrix]).data
    nbytes = _C.prepack_size(record.ctypes.data, record.size, "plain")
    copies = []
    for _ in range(64 // bits):
        memory = np.empty(nbytes + 63, dtype=np.uint8)
        layout = memory[-memory.ctypes.data % 64 :][:nbytes]
        _C.prepack(record.ctypes.data, record.size, "plain", layout.ctypes.data, nbytes, threads)
        copies.append(layout)
    return copies


def tune(
    threads: int = 0, seconds: float = 0.2, progress: Callable[[str], None] | None = None, keep: bool = True
) -> TuneResult:
    """Measure prefetch distances at one token, of int2 and int4, and the crossover to unpacked codes, of int4.

    Args:
        threads: 0 takes all that may be used.
        seconds: how long each candidate is measured at least.
        progress: told what is being measured.
        keep: write the result to `cache_path`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    rows, columns = SHAPE
    generator = np.random.default_rng(0)
    layouts = {bits: itertools.cycle(_copies(bits, generator, threads)) for bits in (2, 4)}

    def measure(bits: int, tokens: int) -> float:
        x = generator.standard_normal((tokens, columns), dtype=np.float32)
        y, offsets = np.empty((tokens, rows), dtype=np.float32), np.array([0, tokens])
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begin < seconds:
            layout, started = next(layouts[bits]), time.perf_counter()
            _C.prepacked_linear(
                layout.ctypes.data, layout.nbytes, offsets.ctypes.data, 2, x.ctypes.data, "float32", tokens, columns,
                y.ctypes.data, rows, "int8", threads,
            )  # fmt: skip
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    before = _C.tuning()
    values = dict(before)
    trials: dict[str, dict[int, float]] = {name: {} for name in values}
    try:
        # Far or near, not both: where the processor's own prefetchers do well, near requests help them and far ones do
        # not, and the other way round.
        for width, bits in (("narrow", 2), ("wide", 4)):
            names = f"prefetch_{width}", f"near_{width}"
            values |= dict.fromkeys(names, 0)
            for name, distances in zip(names, (PREFETCH, NEAR), strict=True):
                for distance in distances:
                    if progress:
                        progress(f"{bits} bits, {name} {distance} bytes ahead")
                    _C.set_tuning(**{**values, name: distance})
                    trials[name][distance] = measure(bits, 1)
            _, name, distance = min((time, name, at) for name in names for at, time in trials[name].items())
            values[name] = distance
        # Up to how many tokens reading packed lines is the faster way: the last size at which it is.
        direct = DIRECT_TOKENS[0]
        for tokens in DIRECT_TOKENS:
            if progress:
                progress(f"{tokens} tokens, packed and unpacked")
            _C.set_tuning(**{**values, "direct_tokens": tokens})
            packed = measure(4, tokens)
            _C.set_tuning(**{**values, "direct_tokens": tokens - 1})
            unpacked = measure(4, tokens)
            trials["direct_tokens"][tokens] = packed / unpacked
            if packed > unpacked:
                break
            direct = tokens
    finally:
        _C.set_tuning(**before)
    values["direct_tokens"] = direct
    _C.set_tuning(**values)
    return TuneResult(values, trials, str(save(values)) if keep else "")
