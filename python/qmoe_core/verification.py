"""Is a compressed checkpoint whole and unchanged? Sizes, checksums, and a strict decode of every packed tensor.

A CRC finds accidents (a bad disk, a cut-off copy), not forgery: whoever can change a tensor can change its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _C
from .checkpoint import QMOE_JSON, read_qmoe_json
from .errors import QmoeError
from .formats import PackedTensor
from .progress import ProgressEvent
from .source import load_json
from .store import check_size, crc32c, io_errors


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `code` as in errors.CODES, and where."""

    code: str
    message: str
    file: str | None
    tensor: str | None

    def __str__(self) -> str:
        return f"{self.tensor or self.file}: {self.code}: {self.message}"


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found.

    Attributes:
        directory: the checkpoint. `problems`: what is wrong; empty means sound.
        files, tensors, packed_tensors, matrices: how many of each were checked.
        nbytes: bytes of the files that belong to the checkpoint.
        unknown_files: files in the directory that the checkpoint does not know of; no problem by themselves.
    """

    directory: str
    problems: tuple[Problem, ...]
    files: int
    tensors: int
    packed_tensors: int
    matrices: int
    nbytes: int
    unknown_files: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(
    directory: str | os.PathLike[str], *, progress: Callable[[ProgressEvent], None] | None = None
) -> VerificationReport:
    """Checks every file of a compressed checkpoint against its qmoe.json.

    Sizes of all files; SHA-256 of the copied ones; for every tensor its shard, type and CRC32C; for every packed tensor
    also the strict decode of all its matrices, its shape, and what config.json says of it. All problems are collected.

    Args:
        progress: called with a `ProgressEvent` (stage "verify", bytes) after each tensor.

    Raises:
        QmoeError: what keeps it from starting: `E_MISSING` (no qmoe.json), `E_CORRUPT`, `E_VERSION`, `E_IO`.
    """
    return _Verification(Path(directory), progress).run()


class _Verification:
    def __init__(self, directory: Path, progress: Callable[[ProgressEvent], None] | None) -> None:
        self.directory, self.progress = directory, progress
        self.result = read_qmoe_json(directory)
        self.problems: list[Problem] = []
        self.done = self.tensors = self.packed = self.matrices = 0
        self.by_file: dict[str, dict[str, dict[str, Any]]] = {}
        try:
            self.total = sum(int(size) for size in self.result["files"].values())
            for kind in ("plain", "packed"):
                for name, entry in self.result[kind].items():
                    self.by_file.setdefault(_file_name(entry["file"]), {})[name] = entry
            for name in self.result["files"]:
                _file_name(name)
        except (KeyError, TypeError, ValueError) as error:
            raise QmoeError("E_CORRUPT", f"malformed: {error!r}", file=directory / QMOE_JSON) from error

    def run(self) -> VerificationReport:
        for name, size in self.result["files"].items():
            with self._collect(file=name):
                self._file(name, size)
        for name, entries in sorted(self.by_file.items()):
            with self._collect(file=name):
                self._shard(name, entries)
        with self._collect(file="config.json"):
            self._config()
        with io_errors(self.directory):
            present = {entry.name for entry in os.scandir(self.directory) if entry.is_file()}
        return VerificationReport(
            directory=str(self.directory),
            problems=tuple(self.problems),
            files=len(self.result["files"]),
            tensors=self.tensors,
            packed_tensors=self.packed,
            matrices=self.matrices,
            nbytes=self.total,
            unknown_files=tuple(sorted(present - set(self.result["files"]))),
        )

    @contextlib.contextmanager
    def _collect(self, *, file: str, tensor: str | None = None) -> Iterator[None]:
        """A refusal inside the block becomes a problem, and the next check goes on."""
        try:
            yield
        except QmoeError as error:
            where = {"offset": error.offset, "expected": error.expected, "actual": error.actual}
            text = str(QmoeError(error.code, error.message, **where)).removeprefix(f"{error.code}: ")
            self.problems.append(Problem(error.code, text, file, error.tensor or tensor))
        except (KeyError, TypeError, AttributeError) as error:  # JSON of another shape than ours
            self.problems.append(Problem("E_CORRUPT", f"its description is malformed: {error!r}", file, tensor))

    def _file(self, name: str, size: int) -> None:
        path = self.directory / name
        if not path.is_file():
            raise QmoeError("E_MISSING", "the file is absent")
        check_size(path, size)
        digest = self.result["job"]["source"]["files"].get(name)
        if digest is None or name == "config.json":  # the one file that is rewritten: its digest is of the source's
            return
        with io_errors(path):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise QmoeError("E_CHECKSUM", "the SHA-256 differs", expected=digest, actual=found)

    def _shard(self, name: str, entries: dict[str, dict[str, Any]]) -> None:
        path = self.directory / name
        if not path.is_file():
            return  # already reported
        with io_errors(path), _C.SafetensorsFile(str(path)) as shard:
            found = shard.tensors
            for tensor in sorted({*entries, *found}, key=lambda key: found[key][2] if key in found else 0):
                with self._collect(file=name, tensor=tensor):
                    if tensor not in found:
                        raise QmoeError("E_MISSING", "the tensor is not in its file")
                    self.done += found[tensor][3] - found[tensor][2]
                    if tensor not in entries:
                        raise QmoeError("E_NAME", f"{QMOE_JSON} knows no such tensor")
                    self._tensor(shard.read(tensor), entries[tensor])
                self._tell(tensor)

    def _tell(self, detail: str) -> None:
        if self.progress is not None:
            self.progress(ProgressEvent("verify", self.done, self.total, detail))

    def _tensor(self, data: np.ndarray, entry: dict[str, Any]) -> None:
        self.tensors += 1
        actual = crc32c(data)
        if actual != entry["crc32c"]:
            raise QmoeError(
                "E_CHECKSUM", "the CRC32C differs", expected=f"{entry['crc32c']:08x}", actual=f"{actual:08x}"
            )
        if "shape" not in entry:
            return
        record = PackedTensor(data)
        shape = (record.experts, record.rows, record.cols)
        if list(shape) != list(entry["shape"]):
            raise QmoeError("E_SHAPE", "the record has another shape", expected=tuple(entry["shape"]), actual=shape)
        record.verify()
        self.packed += 1
        self.matrices += record.experts

    def _config(self) -> None:
        path = self.directory / "config.json"
        if not path.is_file():
            return  # already reported
        described = load_json(path)["quantization_config"]["packed"]
        listed = {
            f"{module}.{parameter}_qmoe": (value["shape"], value["nbytes"])
            for module, entry in described.items()
            for parameter, value in entry["tensors"].items()
        }
        stored = {name: (entry["shape"], entry["nbytes"]) for name, entry in self.result["packed"].items()}
        names = [name for name in sorted({*listed, *stored}) if listed.get(name) != stored.get(name)]
        if names:
            raise QmoeError("E_CORRUPT", f"it disagrees with {QMOE_JSON}", tensor=names[0])


def _file_name(name: str) -> str:
    """The name, if it stays inside the directory; `ValueError` otherwise."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"not a file name: {name!r}")
    return name
