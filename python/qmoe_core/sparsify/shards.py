"""A checkpoint's weight files once more, with the values of some tensors replaced.

Pruning changes neither names nor types nor shapes, so every tensor keeps its place: files are made at their full size
beforehand, a disk too small is found at the start, and tensors can be written in any order. Until all is done they lie
in the journal's directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..source import FLOAT_DTYPES, SourceCheckpoint, SourceTensor
from ..store import crc32c, io_errors, publish, sync_directory, write_all

CHUNK = 8 << 20  # bytes that are copied at a time


class RewrittenShards:
    """The files. Use as a context manager.

    Raises:
        QmoeError: `E_NO_SPACE`, `E_IO`, from everything here.
    """

    def __init__(self, checkpoint: SourceCheckpoint, output: Path, journal: Path) -> None:
        """Makes the files that are not there yet, with the headers of the source's."""
        self.checkpoint, self.output, self.journal = checkpoint, output, journal
        self.names = sorted({tensor.file for tensor in checkpoint.tensors.values()})
        self._fds: dict[str, int] = {}
        try:
            for name in self.names:
                self._open(name)
        except BaseException:
            self.close()
            raise
        with io_errors(journal):
            sync_directory(journal)

    def _open(self, name: str) -> None:
        begin = min(t.begin for t in self.checkpoint.tensors.values() if t.file == name)
        size = max(t.end for t in self.checkpoint.tensors.values() if t.file == name)
        path = self.path(name)
        with io_errors(path):
            fd = self._fds[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if path.parent == self.output:
                return
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, size)
                os.posix_fallocate(fd, 0, size)
            # Always: a file of the right size may be one whose header a power cut has lost.
            with io_errors(self.checkpoint.directory / name), open(self.checkpoint.directory / name, "rb") as source:
                write_all(fd, source.read(begin))

    def path(self, name: str) -> Path:
        """Where a file is now."""
        final = self.output / name
        return final if final.exists() else self.journal / f"{name}.part"

    def __enter__(self) -> RewrittenShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def write(self, tensor: SourceTensor, index: int | None, values: torch.Tensor, crc: int = 0) -> int:
        """Writes a tensor, or slice `index` of its first dimension: values of its shape, float on the host. Returns the
        CRC32C of the bytes, continuing from `crc`."""
        data = values.to(FLOAT_DTYPES[tensor.dtype]).contiguous().view(-1).view(torch.uint8).numpy()
        begin = tensor.begin + (0 if index is None else index * data.nbytes)
        self._write(tensor.file, begin, memoryview(data.data))
        return crc32c(data, crc)

    def _write(self, file: str, begin: int, data: memoryview) -> None:
        done = 0
        with io_errors(self.path(file)):
            while done < len(data):
                done += os.pwrite(self._fds[file], data[done : done + CHUNK], begin + done)

    def copy(self, tensor: SourceTensor) -> int:
        """Copies a tensor from the source. Returns the CRC32C of its bytes."""
        crc, begin = 0, tensor.begin
        for chunk in self.checkpoint.chunks(tensor, CHUNK):
            self._write(tensor.file, begin, memoryview(chunk.data))
            crc, begin = crc32c(chunk, crc), begin + chunk.nbytes
        return crc

    def checksum(self, tensor: SourceTensor) -> int:
        """The CRC32C of a tensor's bytes as they are in the file."""
        crc, begin = 0, tensor.begin
        with io_errors(self.path(tensor.file)):
            while begin < tensor.end:
                chunk = os.pread(self._fds[tensor.file], min(CHUNK, tensor.end - begin), begin)
                if not chunk:
                    return -1
                crc, begin = crc32c(chunk, crc), begin + len(chunk)
        return crc

    def sync(self, files: Iterable[str] | None = None) -> None:
        """Makes durable what was written to these files (to all)."""
        for name in self.names if files is None else files:
            with io_errors(self.path(name)):
                os.fsync(self._fds[name])

    def publish(self) -> dict[str, int]:
        """Gives the files their final names. Returns their sizes."""
        sizes = {}
        for name in self.names:
            path = self.path(name)
            with io_errors(path):
                sizes[name] = os.fstat(self._fds[name]).st_size
                if path.parent != self.output:
                    publish(path, self.output / name)
        return sizes
