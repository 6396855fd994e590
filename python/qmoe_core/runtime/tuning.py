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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..errors import QmoeError
from ..formats import IntFormat, IntMatrix, PackedTensor

VERSION = 4
PREFETCH = (0, 1024, 2048, 4096, 8192, 16384)  # into the second-level cache
NEAR = (64, 128, 192, 256, 384, 1024, 2048, 3072)  # into the first
DIRECT_TOKENS = (4, 8, 16, 32, 128, 1024)
SHAPE = (4096, 4096)
COLD_BYTES = 1 << 30  # of copies that take turns: last-level caches of hundreds of MiB are found on servers


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        values: `{"prefetch_narrow": bytes ahead, "prefetch_wide": bytes ahead, "near_narrow": bytes ahead,
            "near_wide": bytes ahead, "direct_tokens": tokens}`, see qmoe/prepacked.h.
        trials: `{"prefetch_narrow": {value: seconds of one token}, "prefetch_wide", "near_narrow", "near_wide",
            "both_narrow", "both_wide": the same, "direct_tokens": {tokens: time of reading packed lines over that of
            unpacked codes}}`, medians. Near distances were tried alone, and as "both" beside the best far one.
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
    copies: list[NDArray[np.uint8]] = []
    for _ in range(max(2, COLD_BYTES // nbytes)):
        memory = np.empty(nbytes + 63, dtype=np.uint8)
        copies.append(memory[-memory.ctypes.data % 64 :][:nbytes])
        if len(copies) == 1:
            _C.prepack(record.ctypes.data, record.size, "plain", copies[0].ctypes.data, nbytes, threads)
        else:
            copies[-1][:] = copies[0]
    return copies


def tune(
    threads: int = 0, seconds: float = 0.2, progress: Callable[[str], None] | None = None, keep: bool = True
) -> TuneResult:
    """Measure prefetch distances at one token, of int2 and int4, and the crossover to unpacked codes, of int4.

    It takes `COLD_BYTES` of memory and about 20 seconds.

    Args:
        threads: 0 takes all that may be used.
        seconds: how long each candidate is measured at least.
        progress: told what is being measured.
        keep: write the result to `cache_path`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    rows, columns = SHAPE
    generator = np.random.default_rng(0)
    layouts: Iterator[NDArray[np.uint8]] = iter(())

    def measure(tokens: int) -> float:
        x = generator.standard_normal((tokens, columns), dtype=np.float32)
        y, offsets = np.empty((tokens, rows), dtype=np.float32), np.array([0, tokens])
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begin < seconds:
            layout, started = next(layouts), time.perf_counter()
            _C.prepacked_linear(
                layout.ctypes.data, layout.nbytes, offsets.ctypes.data, 2, x.ctypes.data, "float32", tokens, columns,
                y.ctypes.data, rows, "int8", threads,
            )  # fmt: skip
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def one_token(width: str, bits: int, far: int, near: int) -> float:
        if progress:
            progress(f"{bits} bits, {far} bytes ahead into the second-level cache, {near} into the first")
        _C.set_tuning(**{**values, f"prefetch_{width}": far, f"near_{width}": near})
        return measure(1)

    before = _C.tuning()
    values = dict(before)
    trials: dict[str, dict[int, float]] = {"direct_tokens": {}}
    try:
        # Far, near, or both: some processors' own prefetchers are helped by near requests and disturbed by far ones.
        for width, bits in (("narrow", 2), ("wide", 4)):
            layouts = iter(())  # one width's copies are in memory at a time; those of int4 remain
            layouts = itertools.cycle(_copies(bits, generator, threads))
            far_name, near_name, both_name = (f"{kind}_{width}" for kind in ("prefetch", "near", "both"))
            trials[far_name] = {far: one_token(width, bits, far, 0) for far in PREFETCH}
            trials[near_name] = {near: one_token(width, bits, 0, near) for near in NEAR}
            best = min(PREFETCH[1:], key=trials[far_name].__getitem__)
            trials[both_name] = {near: one_token(width, bits, best, near) for near in NEAR if near < best}
            found = {(far, 0): time for far, time in trials[far_name].items()}
            found |= {(0, near): time for near, time in trials[near_name].items()}
            found |= {(best, near): time for near, time in trials[both_name].items()}
            values[far_name], values[near_name] = min(found, key=found.__getitem__)
        # Up to how many tokens reading packed lines is the faster way: the last size at which it is.
        direct = DIRECT_TOKENS[0]
        for tokens in DIRECT_TOKENS:
            if progress:
                progress(f"{tokens} tokens, packed and unpacked")
            _C.set_tuning(**{**values, "direct_tokens": tokens})
            packed = measure(tokens)
            _C.set_tuning(**{**values, "direct_tokens": tokens - 1})
            unpacked = measure(tokens)
            trials["direct_tokens"][tokens] = packed / unpacked
            if packed > unpacked:
                break
            direct = tokens
    finally:
        _C.set_tuning(**before)
    values["direct_tokens"] = direct
    _C.set_tuning(**values)
    return TuneResult(values, trials, str(save(values)) if keep else "")
