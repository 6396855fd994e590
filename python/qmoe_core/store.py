"""Durable files: whole or absent, and on the disk once a call returns.

Every write goes to a temporary name in the same directory, is fsynced, renamed over the final name, and the directory
is fsynced as well: without the last step a power cut can forget the rename. A rename that fails is an error: a plain
overwrite in its place would give up the promise without anybody noticing.

Only `os.*` calls are used, one system call each, so that the fault tests can fail every single one of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _C
from .errors import QmoeError

TEMPORARY_SUFFIX = ".qmoe-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# safetensors dtype name -> bytes per element; the order is the one in which a shard stores its tensors (see
# `ShardWriter`).
DTYPE_BYTES = {
    "I64": 8, "U64": 8, "F64": 8, "I32": 4, "U32": 4, "F32": 4, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@contextlib.contextmanager
def io_errors(path: Path | str) -> Iterator[None]:
    """Turns an OSError into `E_NO_SPACE` (disk or quota full) or `E_IO` (everything else), naming the file."""
    try:
        yield
    except OSError as error:
        code = "E_NO_SPACE" if error.errno in _FULL else "E_IO"
        raise QmoeError(code, error.strerror or str(error), file=error.filename or path) from error


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes every byte: `os.write` may write fewer than it is given (pipes, full disks, signals)."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.write(fd, view)
        if written == 0:
            raise OSError(errno.EIO, "write made no progress")
        view = view[written:]


def sync_directory(path: Path) -> None:
    """Makes the names inside a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished, already fsynced file into place and makes the new name durable."""
    os.replace(temporary, final)
    sync_directory(final.parent)
    if temporary.parent != final.parent:
        sync_directory(temporary.parent)


def write_atomic(path: Path, chunks: bytes | Iterator[bytes | memoryview]) -> int:
    """Writes a file whole or not at all, and durably. Returns its size in bytes.

    Raises:
        QmoeError: `E_NO_SPACE` or `E_IO`; the temporary file is then gone and an older `path` is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    size = 0
    with io_errors(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
                    write_all(fd, chunk)
                    size += len(chunk)
                os.fsync(fd)
            finally:
                os.close(fd)
            publish(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return size


def check_size(path: Path, expected: int) -> None:
    """Raises `E_TRUNCATED` or `E_OFFSET` (bytes too many) unless the file has the expected size, `E_IO` if absent."""
    with io_errors(path):
        actual = os.stat(path).st_size
    if actual != expected:
        code = "E_TRUNCATED" if actual < expected else "E_OFFSET"
        raise QmoeError(code, "the file has another size", file=path, expected=expected, actual=actual)


def read_chunks(path: Path, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
    """The content of a file, piece by piece."""
    with io_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            while chunk := os.read(fd, chunk_bytes):
                yield chunk
        finally:
            os.close(fd)


def crc32c(data: bytes | np.ndarray, seed: int = 0) -> int:
    """CRC32C of bytes, continuing from `seed`."""
    array = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    value: int = _C.crc32c(array, seed)
    return value


_CRC32C = 0x82F63B78  # the polynomial, x^31 in the lowest bit


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial of CRC32C; bit 31 is the coefficient of 1, bit 0 that of x^31."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_CRC32C if b & 1 else 0)
    return result


def crc32c_joined(first: int, second: int, nbytes: int) -> int:
    """CRC32C of two byte strings, one behind the other, from those of each; `nbytes`: length of the second one.

    A CRC is linear in its message, and bytes behind a message multiply it by x^8 each.
    """
    if first == 0:
        return second
    power, square, left = 1 << 31, 1 << 23, nbytes  # 1 and x^8
    while left:
        if left & 1:
            power = _product(power, square)
        square, left = _product(square, square), left >> 1
    return _product(power, first) ^ second


def canonical_json(value: object, *, indent: int | None = None) -> bytes:
    """JSON with sorted keys and fixed separators: equal values give equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=separators, indent=indent).encode()


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that a shard will hold. `nbytes` is exact for a plain tensor; for a packed one (`shape` None: uint8,
    length unknown until it is encoded) it is an upper estimate, used to reserve header room and to fill shards
    evenly."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int


class ShardWriter:
    """Writes one safetensors file tensor by tensor, never holding more than the caller's current chunk.

    A safetensors header stands before the data, but the lengths of entropy-coded tensors are known only afterwards. The
    format allows spaces after the header's JSON, so room for the longest possible header is reserved and filled in at
    the end. Writing the data elsewhere first would cost a second pass over the disk.

    The file grows under a temporary name; `synced()` says from where an interrupted writer can continue.
    """

    def __init__(self, path: Path, plans: Sequence[TensorPlan], resume_sizes: Sequence[int] = ()) -> None:
        """Opens or creates `path`; `resume_sizes` are the byte sizes of leading tensors already in it and durable."""
        self.path, self.plans, self.sizes = path, plans, list(resume_sizes)
        self.data_start = self.start_of_data(plans)
        self.position = self.data_start + sum(self.sizes)
        with io_errors(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self.fd, self.position)
            os.lseek(self.fd, self.position, os.SEEK_SET)
        self._tensor_start = self.position
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._flush: Future[None] | None = None

    @classmethod
    def start_of_data(cls, plans: Sequence[TensorPlan]) -> int:
        """Bytes before the first tensor: the length field and the room for the longest header, a multiple of 8."""
        longest = cls._layout(plans, [plan.nbytes if plan.shape is not None else 1 << 50 for plan in plans])
        return -(-(8 + len(longest)) // 8) * 8

    @staticmethod
    def _layout(plans: Sequence[TensorPlan], sizes: Sequence[int]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for plan, size in zip(plans, sizes, strict=True):
            shape = [size] if plan.shape is None else list(plan.shape)
            header[plan.name] = {"dtype": plan.dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def next_index(self) -> int:
        """The index of the tensor that comes next."""
        return len(self.sizes)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes to the current tensor."""
        with io_errors(self.path):
            write_all(self.fd, data)
        self.position += memoryview(data).nbytes

    def end_tensor(self) -> int:
        """Closes the current tensor and returns its size in bytes; a plain tensor must have exactly the planned
        size."""
        size = self.position - self._tensor_start
        plan = self.plans[len(self.sizes)]
        if plan.shape is not None and size != plan.nbytes:
            raise QmoeError(
                "E_SHAPE", "a copied tensor has the wrong size", tensor=plan.name, expected=plan.nbytes, actual=size
            )
        self.sizes.append(size)
        self._tensor_start = self.position
        return size

    def flush(self) -> None:
        """Lets the disk begin with what is there, in a thread, so that `sync` has less to wait for."""
        if self._flush is None or self._flush.done():
            self._wait()
            self._flush = self._thread.submit(os.fdatasync, self.fd)

    def _wait(self) -> None:
        """The kernel tells of a failed write once: an error that `flush` met must not be lost."""
        with io_errors(self.path):
            if self._flush is not None:
                self._flush.result()
        self._flush = None

    def sync(self) -> None:
        """Makes all finished tensors durable."""
        self._wait()
        with io_errors(self.path):
            os.fsync(self.fd)

    def finish(self, final: Path) -> int:
        """Writes the header, makes the file durable under its final name, and returns its size in bytes."""
        header = self._layout(self.plans, self.sizes)
        room = self.data_start - 8
        assert len(header) <= room
        self._wait()
        with io_errors(self.path):
            os.lseek(self.fd, 0, os.SEEK_SET)
            write_all(self.fd, room.to_bytes(8, "little") + header.ljust(room, b" "))
            os.fsync(self.fd)
            os.close(self.fd)
            self.fd = -1
            publish(self.path, final)
        return self.position

    def close(self) -> None:
        """Closes the file, leaving what is written for a later resume."""
        self._thread.shutdown()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
