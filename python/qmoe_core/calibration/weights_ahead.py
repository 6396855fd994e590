"""Reading weights while the GPU works on those before them, also on those of the layer before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

AHEAD = 3  # pieces that are read, or being read, before they are asked for: two stacks of a chunk of experts, and
# what else a layer has


@dataclass(frozen=True, eq=False)
class Piece:
    """Weights to be read at a time. Attributes: read: makes them on the device, which the current stream then holds."""

    read: Callable[[], list[torch.Tensor]]


class WeightsAhead:
    """Pieces of weights in the order in which they will be asked for (`plan`). On a GPU a thread reads ahead, and
    copies in a stream of its own; on a CPU, where the processor computes what would be waited for and memory is scarce,
    each is read when it is asked for."""

    def __init__(self, device: str) -> None:
        self._left: deque[Piece] = deque()
        self._device = torch.device(device)
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._ready: deque[tuple[Piece, Future[tuple[list[torch.Tensor], torch.cuda.Event]]]] = deque()
        if self._device.type == "cuda":
            self._thread, self._stream = ThreadPoolExecutor(1), torch.cuda.Stream(self._device)

    @property
    def ahead(self) -> bool:
        """Whether anything is read before it is asked for."""
        return self._thread is not None

    def clear(self) -> None:
        """Forgets what is planned."""
        self._left.clear()
        self._ready.clear()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self.clear()

    def plan(self, pieces: Iterable[Piece]) -> None:
        """What will be asked for behind all that is planned already; reading may begin."""
        self._left.extend(pieces)
        self._submit()

    def next(self, piece: Piece) -> list[torch.Tensor]:
        """The next piece, which is this one. Raises whatever reading raises."""
        if self._thread is None:
            self._left.remove(piece)
            return piece.read()
        future = next((future for planned, future in self._ready if planned is piece), None)
        if future is not None:
            self._ready.remove((piece, future))
        else:  # a layer has called its modules in another order
            self._left.remove(piece)
            future = self._thread.submit(self._in_stream, piece)
        weights, copied = future.result()
        self._submit()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for tensor in weights:
            tensor.record_stream(stream)  # its memory is not used again before this stream is done with it
        return weights

    def _submit(self) -> None:
        while self._thread is not None and self._left and len(self._ready) < AHEAD:
            piece = self._left.popleft()
            self._ready.append((piece, self._thread.submit(self._in_stream, piece)))

    @torch.no_grad()
    def _in_stream(self, piece: Piece) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            weights = piece.read()
            return weights, self._stream.record_event()  # type: ignore[union-attr]
