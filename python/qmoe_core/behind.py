"""Work that is done behind the computation, in order, by a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Does things in the order in which they come, a few of them behind: what they need is in memory until then.

    What one of them raises, `do` and `wait` raise, `wait` at the latest; nothing after it is done.
    """

    def __init__(self, ahead: int = 2) -> None:
        """`ahead`: how many things may wait or be under way."""
        self.ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def do(self, work: Callable[[], None]) -> None:
        """Only one thread may call this."""
        while len(self._pending) >= self.ahead:
            self._pending[0].result()
            self._pending.popleft()
        self._pending.append(self._thread.submit(self._unless_failed, work))

    def _unless_failed(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
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
