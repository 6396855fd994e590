"""Activations of all calibration tokens: on the device or in memory while they fit, in files where not, and safe from
a kill.

Files are written with `pwrite` and never through a memory map: on a full disk a map kills the process with SIGBUS, a
write returns an error. Their blocks are reserved when they are made, so that a disk too small is found at the start;
where they are not needed at once, behind the computation of the first layer.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ..behind import Behind
from ..store import crc32c, io_errors

CHUNK = 8 << 20  # bytes per system call
DEVICE_PART = 8  # a buffer lies on the device if it takes at most the 1/DEVICE_PART of the memory that is free there


class Budget:
    """Memory that buffers may still take; what no longer fits goes to files."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes

    def take(self, nbytes: int) -> bool:
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.left += nbytes


class _File:
    """A file of fixed size, read and written at offsets. Raises `E_NO_SPACE`, `E_IO`."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        with io_errors(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(self.fd, nbytes)
            except BaseException:
                os.close(self.fd)
                raise

    def reserve(self) -> None:
        """What it raises leaves the file closed."""
        try:
            with io_errors(self.path):
                if self.nbytes:
                    os.posix_fallocate(self.fd, 0, self.nbytes)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous uint8 array."""
        view, done = memoryview(out.data), 0
        with io_errors(self.path):
            while done < len(view):
                count = os.preadv(self.fd, [view[done : done + CHUNK]], offset + done)
                if count == 0:
                    raise OSError(5, "the file ends early")
                done += count

    def write(self, offset: int, data: np.ndarray) -> None:
        view, done = memoryview(data.data), 0
        with io_errors(self.path):
            while done < len(view):
                done += os.pwrite(self.fd, view[done : done + CHUNK], offset + done)

    def sync(self) -> None:
        with io_errors(self.path):
            os.fsync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """A copy as float32 on the host, byte by byte."""
    out = torch.empty(tensor.shape, pin_memory=tensor.is_cuda)
    out.copy_(tensor.detach())
    return out.view(-1).view(torch.uint8).numpy()


def _place(device: str, nbytes: int, budget: Budget) -> str | None:
    """Where a buffer lies: on the device, if that is a CUDA device with room for it; on the host ("cpu"), which takes
    from `budget`; None for a file."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if nbytes <= free // DEVICE_PART:
            return device
    return "cpu" if budget.take(nbytes) else None


class RowBuffer:
    """(rows, width) float32, zero at first; rows are written in order and gathered in any order.

    It lies on `device` where that is a CUDA device with room for it, else in the host's memory while `budget` lasts,
    else in the file `spill`: what is read is the same.
    """

    def __init__(self, rows: int, width: int, budget: Budget, spill: Path, device: str = "cpu") -> None:
        self.rows, self.width = rows, width
        self.nbytes = 4 * rows * width
        self._spill = spill
        self._memory: torch.Tensor | None = None
        self._file: _File | None = None
        place = _place(device, self.nbytes, budget)
        self._budget = budget if place == "cpu" else None  # that memory was taken from
        if place is not None:
            self._memory = torch.zeros(rows, width, device=place)
        else:
            with io_errors(spill):
                spill.unlink(missing_ok=True)  # a new file reads as zeros
            self._file = _File(spill, self.nbytes)
            self._file.reserve()

    def write(self, first: int, values: torch.Tensor) -> None:
        """Rows from `first` on: values (n, width), any float type, any device."""
        if self._memory is not None:
            self._memory[first : first + len(values)].copy_(values)
        else:
            assert self._file is not None
            self._file.write(4 * self.width * first, _bytes(values))

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) as (n, width) float32, on the host or where the buffer is."""
        if self._memory is not None:
            return self._memory[first:last]
        assert self._file is not None
        out = torch.empty(last - first, self.width)
        self._file.read(4 * self.width * first, out.view(-1).view(torch.uint8).numpy())
        return out

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by number, ascending int64 (n,), as (n, width) float32, on the host or where the buffer is."""
        if self._memory is not None:
            return self._memory.index_select(0, rows.to(self._memory.device))
        assert self._file is not None
        out = torch.empty(len(rows), self.width)
        data, step = out.view(-1).view(torch.uint8).numpy(), 4 * self.width
        for at, row in enumerate(rows.tolist()):
            self._file.read(step * row, data[step * at : step * (at + 1)])
        return out

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values (n, width) to distinct rows."""
        if self._memory is not None:
            device = self._memory.device
            self._memory.index_add_(0, rows.to(device), values.to(device, torch.float32))
            return
        assert self._file is not None
        data, step = _bytes(self.gather(rows) + values.to("cpu", torch.float32)), 4 * self.width
        for at, row in enumerate(rows.tolist()):
            self._file.write(step * row, data[step * at : step * (at + 1)])

    def close(self) -> None:
        """Gives the memory back or deletes the file."""
        self._memory = None
        if self._budget is not None:
            self._budget.give(self.nbytes)
            self._budget = None
        if self._file is not None:
            self._file.close()
            self._file = None
            with io_errors(self._spill):
                os.unlink(self._spill)


class States:
    """Inputs of the current layer, (windows, *shape) float32: in memory if they fit (as a `RowBuffer` does), else on
    the disk; behind some layers on the disk in any case, for a process that goes on after this one was killed.

    Those of layer i are in file i % 2, if they are in one. Whoever keeps some keeps those of an even layer and of an
    odd one in turn, and makes them durable (`commit`) before the journal says so: whenever the process dies, the last
    whole set is there. The embeddings a new process makes again.

    Attributes:
        in_memory: whether files are only for a later process.
    """

    def __init__(
        self, directory: Path, name: str, windows: int, shape: tuple[int, ...], budget: Budget, device: str = "cpu"
    ) -> None:
        """Reserves both files, behind the computation if the states fit in memory: then `begin` raises. Raises
        `E_NO_SPACE`, `E_IO`."""
        self.windows, self.shape = windows, shape
        self._window_bytes = 4 * int(np.prod(shape))
        nbytes = windows * self._window_bytes
        self._files = [_File(directory / f"{name}-{k}", nbytes) for k in range(2)]
        place = _place(device, nbytes, budget)
        self._memory = None if place is None else torch.empty(windows, *shape, device=place)
        self._behind = Behind()
        self.in_memory = self._memory is not None
        self._current, self._kept = 0, not self.in_memory
        self._crc = 0
        for file in self._files:
            self._behind.do(file.reserve)
        if not self.in_memory:
            self._behind.wait()

    def begin(self, layer: int, keep: bool) -> None:
        """Layer `layer` - 1 writes what layer `layer` will read (0: the embeddings); `keep`: into a file, too."""
        self._behind.wait()
        self._current, self._kept, self._crc = layer, keep or not self.in_memory, 0

    def write(self, first: int, values: torch.Tensor) -> None:
        """Windows from `first` on; they must come in order."""
        if self._kept:
            file, data = self._files[self._current % 2], _bytes(values)

            def keep() -> None:
                file.write(first * self._window_bytes, data)
                self._crc = crc32c(data, self._crc)

            self._behind.do(keep)
        if self._memory is not None:
            self._memory[first : first + len(values)].copy_(values)

    def commit(self) -> int:
        """Makes what was written durable; returns its CRC32C. Another thread may do this until `begin`."""
        self._behind.wait()
        self._files[self._current % 2].sync()
        return self._crc

    def restore(self, layer: int, crc: int) -> bool:
        """Goes back to the inputs of `layer`, as a killed run left them; False if they are not sound."""
        self._current, found = layer, 0
        for first in range(self.windows):
            data = np.empty(self._window_bytes, dtype=np.uint8)
            self._files[layer % 2].read(first * self._window_bytes, data)
            found = crc32c(data, found)
            if self._memory is not None:
                self._memory[first].copy_(torch.from_numpy(data).view(torch.float32).view(self.shape))
        return found == crc

    def read(self, layer: int, first: int, last: int) -> torch.Tensor:
        """Windows [first, last) of the inputs of `layer`, on the host or where they are. In memory they are overwritten
        by `write`, window by window."""
        if self._memory is not None:
            return self._memory[first:last]
        self._behind.wait()
        out = torch.empty(last - first, *self.shape)
        self._files[layer % 2].read(first * self._window_bytes, out.view(-1).view(torch.uint8).numpy())
        return out

    def close(self) -> None:
        self._behind.close()
        for file in self._files:
            file.close()
        self._memory = None
