"""Reading experts' weights while the GPU works on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..families import Target
from .distributed import Round

AHEAD = 2  # stacks of a chunk of experts that are read, or being read, before they are asked for

Piece = tuple[Target, Round]


class WeightsAhead:
    """Stacks of weights in a known order. On a GPU a thread reads ahead, and copies in a stream of its own; on a CPU,
    where the processor computes what would be waited for and memory is scarce, each is read when it is asked for."""

    def __init__(self, read: Callable[[Target, Round], torch.Tensor], pieces: Sequence[Piece], device: str) -> None:
        """`read` makes a stack on the device, which the current stream then holds."""
        self._read, self._left, self._device = read, deque(pieces), torch.device(device)
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._ready: deque[tuple[Piece, Future[tuple[torch.Tensor, torch.cuda.Event]]]] = deque()

    def start(self) -> None:
        """Begins to read ahead; `close` ends it."""
        if self._device.type == "cuda":
            self._thread, self._stream = ThreadPoolExecutor(1), torch.cuda.Stream(self._device)
            self._submit()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._ready.clear()

    def next(self, target: Target, work: Round) -> torch.Tensor:
        """The next stack, which is this one. Raises whatever reading raises."""
        if self._thread is None:
            return self._read(target, work)
        piece, future = self._ready.popleft()
        assert piece[0] is target and piece[1] is work
        weights, copied = future.result()
        self._submit()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        weights.record_stream(stream)  # its memory is not used again before this stream is done with it
        return weights

    def _submit(self) -> None:
        assert self._thread is not None
        while self._left and len(self._ready) < AHEAD:
            piece = self._left.popleft()
            self._ready.append((piece, self._thread.submit(self._in_stream, *piece)))

    @torch.no_grad()
    def _in_stream(self, target: Target, work: Round) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            weights = self._read(target, work)
            return weights, self._stream.record_event()  # type: ignore[union-attr]
