"""The report of a compression: honest sizes, errors per tensor, and what the run cost."""

from __future__ import annotations

import contextlib
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorEntry:
    """One packed tensor of the output.

    Attributes:
        name: its name in the output, ending in "_qmoe"; `module` and `parameter` are where it goes at run time.
        kind: "experts" or "linear"; `role` as in roles.py.
        shape: (E, N, K) of the matrices it holds.
        method: the quantization method; `formats` says how many matrices ended in which format.
        bits_per_weight: bits of the record, all its metadata included, per weight.
        relative_error: ||W - Q|| / ||W|| over all matrices; `zero_fraction`: share of weights that are exactly zero.
        nbytes, crc32c: of the record.
        sources: checkpoint tensors it was made from, each with the CRC32C of its bytes.
        file: the shard that holds it.
        relative_output_error: for calibrated methods: the same of the matrices' outputs on the calibration tokens, else
            None.
        calibration: for calibrated methods: the tokens that each matrix saw ("tokens", "min", "median", "max"), and
            what was done about matrices that saw few ("notes"); else None.
    """

    name: str
    module: str
    parameter: str
    kind: str
    role: str
    shape: tuple[int, int, int]
    method: str
    formats: dict[str, int]
    bits_per_weight: float
    relative_error: float
    zero_fraction: float
    nbytes: int
    crc32c: int
    sources: dict[str, int]
    file: str
    relative_output_error: float | None = None
    calibration: dict[str, Any] | None = None

    @property
    def format(self) -> str:
        """The format's name, or "mixed"."""
        return next(iter(self.formats)) if len(self.formats) == 1 else "mixed"

    @property
    def weights(self) -> int:
        experts, rows, cols = self.shape
        return experts * rows * cols


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        output: the compressed directory. `recipe`: the recipe with every setting spelled out.
        model_type, architecture: what was compressed.
        tensors: one entry per packed tensor.
        original_parameters: elements of all tensors of the source checkpoint; `original_bytes`: bytes of those tensors.
        bytes_on_disk: sum of the sizes of all files in the output, config, index, tokenizer and qmoe.json included.
        files: size of each of them.
        peak_rss_bytes: highest resident memory during this run; `start_rss_bytes`: resident memory when it began (torch
            imported); `rss_limit_bytes`: what the library promises for peak - start: twice the largest layer at 16
            bit, plus 512 MiB, plus `calibration_memory_bytes` (the budgets of the calibration's settings and the
            embeddings in float32). `largest_layer_bytes`: that layer, at 2 bytes per parameter. All of them are 0
            where nothing was left to do.
        read_bytes, written_bytes: what this run read from and wrote to files, caches of the system included.
        calibration: settings of a calibrated compression and the SHA-256 of its tokens, else None.
        fit: where formats were chosen for a budget (allocation/fit.py, `FitPlan.summary`): "budget" and
            "predicted_bytes" of the directory, "basis" of the losses, "allocation" (loss, bound, gap, price, optimal),
            "counts" of tensors by role and format, "frontier" as [bytes of the directory, least loss]; else None.
        seconds: wall time of this run. `resumed`: it continued an interrupted one.
    """

    output: str
    recipe: dict[str, Any]
    model_type: str
    architecture: str
    tensors: tuple[TensorEntry, ...]
    original_parameters: int
    original_bytes: int
    bytes_on_disk: int
    files: dict[str, int] = field(default_factory=dict)
    largest_layer_bytes: int = 0
    start_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    calibration_memory_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    calibration: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    seconds: float = 0.0
    resumed: bool = False

    @property
    def bits_per_parameter(self) -> float:
        """All bytes on disk x 8 / all parameters of the original."""
        return self.bytes_on_disk * 8 / self.original_parameters

    @property
    def compression_ratio(self) -> float:
        """Bytes of the source's tensors / all bytes of the output."""
        return self.original_bytes / self.bytes_on_disk

    @property
    def expert_weights(self) -> int:
        """Weights of packed routed experts."""
        return sum(entry.weights for entry in self.tensors if entry.role == "expert")

    @property
    def expert_bits_per_weight(self) -> float | None:
        """Bits of their records per weight of packed routed experts; None where no expert is packed."""
        weights = self.expert_weights
        nbytes = sum(entry.nbytes for entry in self.tensors if entry.role == "expert")
        return nbytes * 8 / weights if weights else None

    @property
    def rss_limit_bytes(self) -> int:
        return 2 * self.largest_layer_bytes + (512 << 20) + self.calibration_memory_bytes

    @property
    def read_mb_per_second(self) -> float:
        """Megabytes (10^6) read per second of this run."""
        return self.read_bytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def written_mb_per_second(self) -> float:
        """Megabytes (10^6) written per second of this run."""
        return self.written_bytes / 1e6 / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; everything above, properties included."""
        result = asdict(self)
        result["tensors"] = [
            {**asdict(entry), "shape": list(entry.shape), "format": entry.format} for entry in self.tensors
        ]
        for name in (
            "bits_per_parameter",
            "compression_ratio",
            "expert_weights",
            "expert_bits_per_weight",
            "rss_limit_bytes",
            "read_mb_per_second",
            "written_mb_per_second",
        ):
            result[name] = getattr(self, name)
        return result


class MemoryMeter:
    """Peak resident memory since it was made, in bytes.

    Linux keeps a high-water mark per process that can be reset; where resetting is not allowed the mark covers the
    whole life of the process, which can only overstate the peak.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self._status("VmRSS")

    @staticmethod
    def _status(key: str) -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak(self) -> int:
        return self._status("VmHWM")


class IoMeter:
    """Bytes that this process has read and written through system calls since the meter was made, as Linux counts them;
    0 where it does not tell."""

    def __init__(self) -> None:
        self._start = self._counters()

    @staticmethod
    def _counters() -> dict[str, int]:
        with contextlib.suppress(OSError, ValueError):
            lines = Path("/proc/self/io").read_text().splitlines()
            return {key: int(value) for key, _, value in (line.partition(":") for line in lines)}
        return {}

    def _since(self, key: str) -> int:
        return self._counters().get(key, 0) - self._start.get(key, 0)

    def read(self) -> int:
        return self._since("rchar")

    def written(self) -> int:
        return self._since("wchar")
