"""Work that is done behind the computation, in order, by a thread of its own."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
SWITCH_SECONDS = 0.0002  # that a thread may keep the interpreter while another one waits for it


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """For the block, threads that run Python behind another one keep that one waiting for `SWITCH_SECONDS` at most,
    not for the 5 ms that Python allows: long enough for a GPU that it feeds to run dry each time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Behind:
    """Does things in the order in which they come, a few of them behind: what they need is in memory until then.

    What one of them raises, `do` and `wait` raise, `wait` at the latest; nothing after it is done.
    """

    def __init__(self, ahead: int = 2) -> None:
        """`ahead`: how many things may wait or be under way."""
        self.ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[Any]] = deque()
        self._failed = False

    def do(self, work: Callable[[], T]) -> Future[T | None]:
        """Only one thread may call this. Returns what `result` takes."""
        while len(self._pending) >= self.ahead:
            self._pending[0].result()
            self._pending.popleft()
        future = self._thread.submit(self._unless_failed, work)
        self._pending.append(future)
        return future

    def result(self, future: Future[T | None]) -> T | None:
        """What a thing that was to be done has returned, once it is. Any thread may call this."""
        value = future.result()
        if self._failed:  # then it was not done, or what raised was behind it
            self.wait()
        return value

    def _unless_failed(self, work: Callable[[], T]) -> T | None:
        if self._failed:
            return None
        try:
            return work()
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Returns once everything is done. Any thread may call this."""
        for future in tuple(self._pending):
            future.result()

    def close(self, drop: bool = True) -> None:
        """Waits for the end of what is under way; what has not begun is dropped, or done as well."""
        self._thread.shutdown(cancel_futures=drop)
        self._pending.clear()
