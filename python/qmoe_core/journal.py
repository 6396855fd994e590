"""The journal of a compression job: who may write, what is already durable, and whether it is still the same job.

`OUT/.qmoe-journal/` holds
    lock          held with flock for as long as the job runs; a second writer gets `E_BUSY`. The kernel releases it
                  when the process dies, however it dies, so there are no stale locks.
    job.json      what the job is: source fingerprint, recipe, options, versions. A resume with another job is
                  `E_CHANGED`.
    progress      one line per finished step: CRC32C in hex, a space, JSON. Lines are appended only after what they
                  tell is durable; a torn last line fails its CRC and is cut off.
    *.part        the shard that is being written.
A job of another `name` (the planning of a budget, before the compression) has its own job.json and progress there,
with the name before them; the lock is one for all.
The directory is removed when the job is done; until then OUT has no config.json and nothing can load it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import QmoeError
from .store import TEMPORARY_SUFFIX, canonical_json, crc32c, io_errors, sync_directory, write_all, write_atomic

DIRECTORY = ".qmoe-journal"


def _first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any]:
    """The first key at which two JSON values differ, as (path, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return path or "job", old, new


OTHER_JOB = "is not what it was when this output was begun; choose another output or delete this one"


def check_same_job(old: dict[str, Any], new: dict[str, Any], file: Path, what: str = OTHER_JOB) -> None:
    """Raises `E_CHANGED`, naming the first thing that differs, unless both descriptions are equal."""
    if old != new:
        where, before, now = _first_difference(old, new)
        raise QmoeError(
            "E_CHANGED",
            f"'{where}' {what}",
            file=file,
            expected=before,
            actual=now,
        )


class Journal:
    """An exclusively locked job directory. Use as a context manager; leaving it releases the lock."""

    def __init__(self, output: Path, name: str = "") -> None:
        """Creates `output` where needed and takes the lock. Raises `E_BUSY` if another process holds it."""
        self.output, self.name = output, name
        self.path = output / DIRECTORY
        self._progress = self.path / f"{name}progress"
        self._progress_fd = -1
        self._pending: list[bytes] = []
        self.steps: list[dict[str, Any]] = []
        self._lock_fd = self._lock()

    def _lock(self) -> int:
        with io_errors(self.path):
            while True:
                os.makedirs(self.path, exist_ok=True)
                try:
                    fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
                except FileNotFoundError:  # the finishing writer removed the directory just now
                    continue
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    os.close(fd)
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise
                    raise QmoeError("E_BUSY", "another process is writing this output", file=self.output) from error
                # The lock counts only if the name still leads to the locked file: its last holder may have deleted it.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.path / "lock")):
                        return fd
                os.close(fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock and keeps the journal, unless no job was ever begun: a refused call leaves nothing
        behind."""
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                if os.listdir(self.path) == ["lock"]:
                    os.unlink(self.path / "lock")
                    os.rmdir(self.path)
        for fd in (self._progress_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._progress_fd = self._lock_fd = -1

    def begin(self, job: dict[str, Any]) -> bool:
        """Starts the job or continues it. Returns True when it continues. Raises `E_CHANGED` if it is another job."""
        file = self.path / f"{self.name}job.json"
        self._remove_temporaries()
        resumed = file.exists()
        if resumed:
            check_same_job(self._load(file), job, self.output)
        else:
            with io_errors(self.path), contextlib.suppress(FileNotFoundError):
                os.unlink(self._progress)
            write_atomic(file, canonical_json(job))
        self._open_progress()
        return resumed

    @staticmethod
    def _load(file: Path) -> dict[str, Any]:
        try:
            with io_errors(file):
                return json.loads(file.read_bytes())
        except json.JSONDecodeError as error:
            raise QmoeError("E_CORRUPT", "the journal is damaged; delete the output directory", file=file) from error

    def _remove_temporaries(self) -> None:
        """Temporary files of a killed writer: nobody else can be writing them, we hold the lock."""
        with io_errors(self.output):
            for directory in (self.output, self.path):
                for name in os.listdir(directory):
                    if name.endswith(TEMPORARY_SUFFIX):
                        os.unlink(directory / name)

    def _open_progress(self) -> None:
        file = self._progress
        with io_errors(file):
            self._progress_fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            data = file.read_bytes()
            good = 0
            for line in data.splitlines(keepends=True):
                crc, _, body = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or crc != b"%08x" % crc32c(body):
                    break
                self.steps.append(json.loads(body))
                good += len(line)
            os.ftruncate(self._progress_fd, good)
            os.lseek(self._progress_fd, good, os.SEEK_SET)
            sync_directory(self.path)

    def note(self, step: dict[str, Any]) -> None:
        """Remembers a finished step; it becomes durable with the next `commit`."""
        body = canonical_json(step)
        self._pending.append(b"%08x %s\n" % (crc32c(body), body))
        self.steps.append(step)

    def commit(self) -> None:
        """Makes all noted steps durable. The caller has already made durable what they tell."""
        if self._pending:
            with io_errors(self._progress):
                write_all(self._progress_fd, b"".join(self._pending))
                os.fsync(self._progress_fd)
            self._pending.clear()

    def rewind(self, keep: int) -> None:
        """Forgets all steps from number `keep` on."""
        self._rewrite(self.steps[:keep])

    def drop(self, steps: Iterable[dict[str, Any]]) -> None:
        """Forgets some steps: what they tell turned out not to be on the disk."""
        gone = {id(step) for step in steps}
        self._rewrite([step for step in self.steps if id(step) not in gone])

    def _rewrite(self, steps: list[dict[str, Any]]) -> None:
        lines = []
        for step in steps:
            body = canonical_json(step)
            lines.append(b"%08x %s\n" % (crc32c(body), body))
        os.close(self._progress_fd)
        write_atomic(self._progress, b"".join(lines))
        self.steps.clear()
        self._pending.clear()
        self._open_progress()

    def remove(self) -> None:
        """Deletes the journal of a finished job. The lock file goes last, so that a killed removal can be repeated."""
        with io_errors(self.path):
            for name in sorted(os.listdir(self.path)):
                if name != "lock":
                    os.unlink(self.path / name)
            os.unlink(self.path / "lock")
            with contextlib.suppress(OSError):  # a waiting second writer may have created its lock file already
                os.rmdir(self.path)
            sync_directory(self.output)
