"""Several processes on one calibration, one device each: who they are, what they exchange, how they fail together.

Calibration code asks its `Group` for sums and objects and does not know whether there are others: the base class is the
group of one process, in which every exchange is the identity.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or inside a process group that the caller
has made, `processes` gives the group of all of them: tensors of the host travel by gloo, those of CUDA devices by NCCL.

No process waits for one that failed. Every wait is a poll, and between polls the processes look into the store that
they met at: for an error that another one has left there, which is then raised here as well, and for signs of life,
which a thread of every process renews. The first error counts; all processes raise the same.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import QmoeError

T = TypeVar("T")
MEET = timedelta(minutes=5)  # for all processes to have started
ENDLESS = timedelta(days=7)  # of one exchange: whether the others live is for the signs of life to tell
SIGN_SECONDS = 2.0  # between a process's signs of life
LOST_SECONDS = 60.0  # without one
LEAVE_SECONDS = 60.0  # for the others to have seen an error before the first of them goes ...
LEAVE_LOST_SECONDS = 5.0  # ... where one is gone already


def parts(items: range, count: int) -> list[range]:
    """A range in `count` contiguous parts, the sizes of which differ by one at most."""
    bounds = [items.start + len(items) * part // count for part in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Round:
    """Experts that are dealt with at the same time.

    Attributes:
        shares: the experts of each process, in order and without gaps. divided: they are all parts of one chunk; else
            each is a chunk of its own.
    """

    shares: list[range]
    divided: bool

    @property
    def experts(self) -> range:
        return range(self.shares[0].start, self.shares[-1].stop)

    def places(self, part: range) -> slice:
        """Where some of the experts are in a stack of all of them."""
        return slice(part.start - self.experts.start, part.stop - self.experts.start)


def rounds(experts: int, chunk: int, size: int) -> list[Round]:
    """All experts in chunks of about equal size, at most `chunk`, a chunk for each of `size` processes at a time. Where
    fewer chunks are left than there are processes, all of them share every chunk."""
    chunks = parts(range(experts), -(-experts // chunk))
    whole = len(chunks) // size * size
    return [Round(chunks[first : first + size], False) for first in range(0, whole, size)] + [
        Round(parts(chunk, size), True) for chunk in chunks[whole:]
    ]


class Group:
    """The processes of one run; this class: a single one.

    Attributes:
        rank: number of this process. size: how many there are. Process 0 leads: it alone writes the output.
        threads: how many this one should use for what the processor does behind the computation; 0 for all.
    """

    rank = 0
    size = 1
    threads = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def suffix(self) -> str:
        """Tells files of this process from those of the others; nothing where it is alone."""
        return "" if self.size == 1 else f"-{self.rank}of{self.size}"

    def part(self, items: range) -> range:
        """What of `items` is this process's."""
        return parts(items, self.size)[self.rank]

    def device(self, wanted: str) -> str:
        """The device that this process uses where the run was told to use `wanted`."""
        return wanted

    def use(self, device: str) -> None:
        """Prepares exchanges between devices: "cuda" is one for each process, numbered by LOCAL_RANK."""

    def end_devices(self) -> None:
        """Says that there will be no exchange between devices until `use` is called again."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up the tensor over all processes, in place; returns it."""
        return tensor

    def sum_to(self, tensor: torch.Tensor, owner: int) -> None:
        """The same for one of them; what the others are left with is undefined."""

    def copy_from(self, tensor: torch.Tensor, owner: int) -> None:
        """Fills the tensor with the owner's, in place."""

    def gather(self, value: T) -> list[T] | None:
        """Everybody's value by rank, for the leading process; None for the others."""
        return [value]

    def gather_all(self, value: T) -> list[T]:
        """Everybody's value by rank."""
        return [value]

    def from_leader(self, value: T) -> T:
        """The leading process's value."""
        return value

    def barrier(self) -> None:
        """Returns once all processes are here."""

    def aside(self) -> Group:
        """The same processes, for exchanges of host tensors by another thread of each: in an order of their own."""
        return self

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """What is raised inside the block on one process is raised on all of them."""
        yield


@dataclass
class Fate:
    """What has become of a run. Attributes: error: the one that counts. lost: whether a process is gone."""

    error: BaseException | None = None
    lost: bool = False


class Processes(Group):
    """All processes of a torch.distributed process group.

    `use`, `sum` and all below are collective: all processes call the same ones in the same order.

    Raises (every method):
        QmoeError: whatever another process has failed with; `E_IO` where one was lost.
    """

    def __init__(self, store: Any, rank: int, size: int, local_rank: int) -> None:
        """`store`: of this group alone."""
        import torch.distributed as dist

        self.rank, self.size, self.local_rank = rank, size, local_rank
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        self.threads = max(1, len(os.sched_getaffinity(0)) // here)
        self._dist, self._store = dist, store
        self._cpu: Any = dist.new_group(backend="gloo", timeout=ENDLESS)
        self._cuda: Any = None
        self._connecting: threading.Thread | None = None  # NCCL
        self._unconnected: RuntimeError | None = None  # why it could not
        self._ending: threading.Thread | None = None  # NCCL's connections
        self._fate = Fate()
        self._aside: Processes | None = None
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()
        self._left = threading.Event()
        self._living = threading.Thread(target=self._live, daemon=True)
        self._living.start()

    def aside(self) -> Processes:
        """Collective at the first call."""
        if self._aside is None:
            other = copy.copy(self)
            other._cpu, other._cuda, other._signs = self._dist.new_group(backend="gloo", timeout=ENDLESS), None, {}
            self._aside = other
        return self._aside

    def device(self, wanted: str) -> str:
        return f"cuda:{self.local_rank}" if wanted == "cuda" else wanted

    def use(self, device: str) -> None:
        """Raises `E_NO_KERNEL` where a process has no such device, `E_VALUE` for one device for all."""
        if not device.startswith("cuda"):
            return
        if device != "cuda":
            raise QmoeError("E_VALUE", "several processes take one CUDA device each", expected="cuda", actual=device)
        counts = self.gather_all((torch.cuda.device_count(), self.local_rank))
        for rank, (count, local_rank) in enumerate(counts):
            if local_rank >= count:
                raise QmoeError(
                    "E_NO_KERNEL",
                    "no CUDA device for every process",
                    expected=f"device cuda:{local_rank} for process {rank}",
                    actual=f"{count} devices",
                )
        torch.cuda.set_device(self.local_rank)
        if self._ending is not None:
            self._ending.join()
        if self._cuda is None:
            self._cuda = self._dist.new_group(backend="nccl", timeout=ENDLESS)
            # NCCL connects at the first exchange and waits for the others there: better now, when all are known to be,
            # and meanwhile other things can be done.
            self._connecting = threading.Thread(target=self._connect, daemon=True)
            self._connecting.start()

    def _connect(self) -> None:
        torch.cuda.set_device(self.local_rank)
        try:
            self._dist.all_reduce(torch.zeros(1, device=f"cuda:{self.local_rank}"), group=self._cuda)
            torch.cuda.synchronize()
        except RuntimeError as error:
            self._unconnected = error

    def end_devices(self) -> None:
        """NCCL takes a while for that: a thread waits."""
        if self._cuda is not None:
            group, self._cuda = self._cuda, None

            def end() -> None:
                torch.cuda.set_device(self.local_rank)
                with contextlib.suppress(RuntimeError):  # another process has failed, which it will tell itself
                    self._dist.destroy_process_group(group)

            self._ending = threading.Thread(target=end, daemon=True)
            self._ending.start()

    # Exchanges.

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self._run(lambda group: self._dist.all_reduce(tensor, group=group, async_op=True), tensor)
        return tensor

    def sum_to(self, tensor: torch.Tensor, owner: int) -> None:
        self._run(lambda group: self._dist.reduce(tensor, dst=owner, group=group, async_op=True), tensor)

    def copy_from(self, tensor: torch.Tensor, owner: int) -> None:
        self._run(lambda group: self._dist.broadcast(tensor, src=owner, group=group, async_op=True), tensor)

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def gather(self, value: T) -> list[T] | None:
        data, sizes = self._same_size(None if self.leads else value)  # the leader's own does not travel
        if self.size == 2:  # what a gather would be, less a copy of the leader's own part, which nobody reads
            others = [data, data]
            self.copy_from(data, 1)
        else:
            others = [_host_bytes(len(data)) for _ in sizes]
            to = others if self.leads else None
            self._run(lambda group: self._dist.gather(data, to, dst=0, group=group, async_op=True), data)
        if not self.leads:
            return None
        return [value, *(unpack(tensor[:nbytes]) for tensor, nbytes in zip(others[1:], sizes[1:], strict=True))]

    def gather_all(self, value: T) -> list[T]:
        data, sizes = self._same_size(value)
        others = [_host_bytes(len(data)) for _ in sizes]
        self._run(lambda group: self._dist.all_gather(others, data, group=group, async_op=True), data)
        return [unpack(t[:n]) for t, n in zip(others, sizes, strict=True)]

    def from_leader(self, value: T) -> T:
        message = Message(value) if self.leads else None
        size = torch.tensor([0 if message is None else message.nbytes])
        self.copy_from(size, 0)
        data = _host_bytes(int(size)) if message is None else message.tensor()
        self.copy_from(data, 0)
        return unpack(data)

    def _same_size(self, value: object) -> tuple[torch.Tensor, list[int]]:
        """The value's bytes, filled up to the most that a process has, and how many each one has."""
        message = Message(value)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = message.nbytes
        counts: list[int] = self.sum(sizes).tolist()
        return message.tensor(max(counts)), counts

    def _run(self, start: Callable[[Any], Any], tensor: torch.Tensor) -> None:
        """Starts an exchange and waits for its end, or for that of another process."""
        if self._fate.error is not None:
            raise self._fate.error
        try:
            while tensor.is_cuda and self._connecting is not None and self._connecting.is_alive():
                self._connecting.join(0.01)
                self._look()
            if tensor.is_cuda and self._unconnected is not None:
                raise self._unconnected
            work = start(self._cuda if tensor.is_cuda else self._cpu)
            polls = 0
            while not work.is_completed():
                polls += 1
                time.sleep(0 if polls < 200 else 0.0001 if polls < 1000 else 0.001)
                self._look()
            work.wait()
        except RuntimeError as error:  # a connection broke: the other end has failed, or is gone
            self._look_for_error(wait=0.5)
            self._fate.lost = True
            raise QmoeError("E_IO", f"another process of this run was lost: {error}") from error

    # Errors and signs of life.

    def _live(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and the run with it
            while not self._left.wait(SIGN_SECONDS if count else 0):
                count += 1
                self._store.set(f"alive-{self.rank}", str(count))

    def _look(self) -> None:
        """At most every half second: raises what another process has failed with, or that one shows no life."""
        now = time.monotonic()
        if now - self._looked < 0.5:
            return
        self._looked = now
        self._look_for_error()
        for rank in range(self.size):
            key = f"alive-{rank}"
            sign = self._store.get(key) if self._store.check([key]) else b""
            if self._signs.get(rank, (None, 0.0))[0] != sign:
                self._signs[rank] = (sign, now)
            elif now - self._signs[rank][1] > LOST_SECONDS:
                self._fate.lost = True
                raise QmoeError("E_IO", f"process {rank} of this run was lost: it shows no sign of life")

    def _look_for_error(self, wait: float = 0.0) -> None:
        end = time.monotonic() + wait
        try:
            while not (there := self._store.check(["error"])) and time.monotonic() < end:
                time.sleep(0.02)
            data = self._store.get("error") if there else b""
        except RuntimeError as error:
            raise QmoeError("E_IO", f"the process that the others meet at was lost: {error}") from error
        if data:
            raise self._of(data)

    def _of(self, data: bytes) -> BaseException:
        error: BaseException = pickle.loads(base64.b64decode(data))
        self._fate.error = error
        return error

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if error is self._fate.error:  # another process's, or already shared
                raise
            first = self._share(error)
            if first is error:
                raise
            raise first from error

    def _share(self, error: BaseException) -> BaseException:
        """Leaves an error for the others, unless one of them was first; returns the one that counts."""
        shown = error
        if not isinstance(error, (QmoeError, KeyboardInterrupt)):
            shown = RuntimeError(f"process {self.rank} of this run: {type(error).__name__}: {error}")
        self._fate.error = error
        text = base64.b64encode(pickle.dumps(shown)).decode()
        try:
            first = self._store.compare_set("error", "", text)
        except RuntimeError:  # the store is gone: the others find that out themselves
            return error
        return error if first == text.encode() else self._of(first)

    def leave(self) -> None:
        """Waits until all processes are about to leave, for a moment only where one has failed. The first one to go
        may take the store with it, and torchrun ends the others when one ends with an error."""
        with contextlib.suppress(RuntimeError):
            here = self._store.add("leaving", 1)
            begun = time.monotonic()
            while here < self.size:
                time.sleep(0.02)
                if self._fate.error is None:
                    try:
                        self._look()
                    except (QmoeError, KeyboardInterrupt, RuntimeError) as error:
                        self._fate.error = error
                limit = LEAVE_LOST_SECONDS if self._fate.lost else LEAVE_SECONDS
                if self._fate.error is not None and time.monotonic() - begun > limit:
                    break
                here = self._store.add("leaving", 0)
        self._left.set()
        self._living.join(SIGN_SECONDS)  # longer only where the store does not answer

    def close(self, whole: bool) -> None:
        """Ends the exchanges; with `whole` also the process group below them. Never waits for a process that failed."""
        if self._fate.error is None:
            if self._ending is not None:
                self._ending.join()
            for group in (self._cuda, self._cpu, None if self._aside is None else self._aside._cpu):
                if group is not None:
                    self._dist.destroy_process_group(group)
            if whole:
                self._dist.destroy_process_group()
            return
        abort = getattr(self._dist.distributed_c10d, "_abort_process_group", None)
        if whole and abort is not None:  # a thread: what is still under way may keep it waiting
            thread = threading.Thread(target=abort, daemon=True)
            thread.start()
            thread.join(5.0)


class Message:
    """A value as bytes. Arrays, which are most of what is sent, are copied once, from where they are:

        int64 number of pieces, and the bytes of each | the pickled value without its arrays | the arrays

    each of them at a multiple of 64 bytes.
    """

    def __init__(self, value: object) -> None:
        arrays: list[pickle.PickleBuffer] = []
        pieces = [memoryview(pickle.dumps(value, protocol=5, buffer_callback=arrays.append))]
        pieces += [array.raw() for array in arrays]
        head = np.array([len(pieces), *(piece.nbytes for piece in pieces)], dtype=np.int64)
        self._pieces = [head.data.cast("B"), *pieces]
        self._places, self.nbytes = _places([piece.nbytes for piece in self._pieces])

    def tensor(self, nbytes: int = 0) -> torch.Tensor:
        """The bytes as uint8, and behind them anything, up to `nbytes`."""
        out = _host_bytes(max(nbytes, self.nbytes))
        whole = out.numpy()
        for first, piece in zip(self._places, self._pieces, strict=True):  # numpy lets other threads run meanwhile
            whole[first : first + piece.nbytes] = np.frombuffer(piece, dtype=np.uint8)
        return out


def _host_bytes(count: int) -> torch.Tensor:
    """Memory for a message: numpy asks the system for large pages, which come several times as fast."""
    return torch.from_numpy(np.empty(count, dtype=np.uint8))


def unpack(data: torch.Tensor) -> Any:
    """The value of a `Message` of another process of this run, which is as trusted as this one. Its arrays stay in the
    tensor's memory."""
    view = data.numpy().data
    (count,) = np.frombuffer(view[:8], dtype=np.int64)
    sizes = np.frombuffer(view[8 : 8 * (1 + count)], dtype=np.int64).tolist()
    places, _ = _places([8 * (1 + count), *sizes])
    value, *arrays = (view[first : first + size] for first, size in zip(places[1:], sizes, strict=True))
    return pickle.loads(value, buffers=arrays)


def _places(sizes: list[int]) -> tuple[list[int], int]:
    """Where pieces of these sizes begin, and where the last one ends."""
    ends = list(itertools.accumulate(sizes, lambda end, size: -(-end // 64) * 64 + size))
    return [end - size for end, size in zip(ends, sizes, strict=True)], ends[-1]


_open: list[Group] = []  # the group of this process while `processes` is in use
_opened = 0


@contextlib.contextmanager
def processes() -> Iterator[Group]:
    """The processes of this run, for the block: those that torchrun started, or those of the process group that is
    there already; this one alone where there is neither. Inside of another such block it gives the same group.

    Raises:
        QmoeError: `E_IO` where the processes do not meet.
    """
    global _opened
    if _open:
        yield _open[-1]
        return
    import torch.distributed as dist

    given = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if given else int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not (given or "RANK" in os.environ):
        yield Group()
        return
    rank = dist.get_rank() if given else int(os.environ["RANK"])
    if not given:
        _meet(rank, size)
    _opened += 1
    store = dist.PrefixStore(f"qmoe-{_opened}", dist.distributed_c10d._get_default_store())
    group = Processes(store, rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    _open.append(group)
    try:
        yield group
    finally:
        _open.pop()
        group.leave()
        group.close(whole=not given)


def _meet(rank: int, size: int) -> None:
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=MEET))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=MEET)
    except (RuntimeError, ValueError) as error:
        raise QmoeError("E_IO", f"the {size} processes of this run do not meet: {error}") from error
