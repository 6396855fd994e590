"""When masks change while a model is trained, and how sparse it is then.

Steps are those of the optimizer, counted from 0: a schedule is asked behind step t, when t + 1 steps are done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ..errors import QmoeError

S = TypeVar("S", bound="Schedule")


def _check(good: bool, message: str, actual: Any) -> None:
    if not good:
        raise QmoeError("E_VALUE", message, actual=actual)


class Schedule(ABC):
    """When masks change, and to which sparsity.

    Example:
        >>> from qmoe_core.sparsify import Cubic, Schedule
        >>> schedule: Schedule = Cubic.of(100)
        >>> schedule.sparsity(99, 0.75)
        0.75
    """

    @abstractmethod
    def changes(self, step: int) -> bool:
        """Whether masks change behind this step."""

    def sparsity(self, step: int, target: float) -> float:
        """The share of zeros behind this step, on the way to `target`."""
        return target

    def extended(self: S, factor: int) -> S:
        """The same with everything `factor` times as long, at the same rate of changes: very sparse models need far
        longer training than dense ones (Kuznedelev et al., arXiv 2308.02060). Multiply the steps of the learning rate's
        schedule as well."""
        _check(factor >= 1, "a schedule is extended by a whole factor", factor)
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        longer = {name: value * factor for name, value in values.items() if name != "every" and value is not None}
        return replace(self, **longer)  # type: ignore[type-var]


@dataclass(frozen=True)
class Constant(Schedule):
    """Masks stay what they were at the start.

    Example:
        >>> from qmoe_core.sparsify import Constant
        >>> Constant().changes(0)
        False
    """

    def changes(self, step: int) -> bool:
        return False


@dataclass(frozen=True)
class OneShot(Schedule):
    """Dense up to `step`, behind which all zeros come at once.

    Example:
        >>> from qmoe_core.sparsify import OneShot
        >>> [OneShot(3).sparsity(step, 0.5) for step in (2, 3, 4)]
        [0.0, 0.5, 0.5]
    """

    step: int = 0

    def changes(self, step: int) -> bool:
        return step == self.step

    def sparsity(self, step: int, target: float) -> float:
        return target if step >= self.step else 0.0


@dataclass(frozen=True)
class Periodic(Schedule):
    """Masks change behind every `every`-th step from `start` up to `end` (None: for ever), at the target's sparsity
    throughout: for RigL and SET.

    Example:
        >>> from qmoe_core.sparsify import Periodic
        >>> [step for step in range(10) if Periodic(every=3, end=7).changes(step)]
        [0, 3, 6]
    """

    every: int = 100
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        _check(self.every >= 1, "masks change every so many steps", self.every)
        sound = self.start >= 0 and (self.end is None or self.end >= self.start)
        _check(sound, "a schedule ends behind its start", self)

    def changes(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step <= self.end) and step % self.every == 0


@dataclass(frozen=True)
class Cubic(Schedule):
    """Gradual pruning (Zhu and Gupta, arXiv 1710.01878): S (1 - (1 - p)^3), where p goes from 0 at step `start` to 1 at
    `end`. Masks change behind every `every`-th step, and when the target is reached.

    p = (step + 1 - start) / (end - start), as in JaxPruner: the step that was just taken counts.

    Example:
        >>> from qmoe_core.sparsify import Cubic
        >>> schedule = Cubic(0, 10, every=5)
        >>> [(step, round(schedule.sparsity(step, 0.8), 4)) for step in range(20) if schedule.changes(step)]
        [(0, 0.2168), (5, 0.7488), (9, 0.8)]
    """

    start: int
    end: int
    every: int = 100

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        _check(self.every >= 1, "masks change every so many steps", self.every)
        _check(0 <= self.start < self.end, "a schedule ends behind its start", self)

    @classmethod
    def of(cls, steps: int, every: int = 100) -> Cubic:
        """The schedule of the sparse scaling laws (Frantar et al., arXiv 2309.08520) for a training of so many steps: a
        quarter of them dense, half of them on the way, a quarter at the target."""
        return cls(steps // 4, max(steps // 4 + 1, 3 * steps // 4), every)

    def changes(self, step: int) -> bool:
        within = self.start <= step < self.end
        return within and (step % self.every == 0 or step == self.end - 1)

    def sparsity(self, step: int, target: float) -> float:
        part = min(max((step + 1 - self.start) / (self.end - self.start), 0.0), 1.0)
        return target * (1.0 - (1.0 - part) ** 3)


@dataclass(frozen=True)
class ACDC(Schedule):
    """Compressed and dense phases in turn (AC/DC, Peste et al., arXiv 2106.12379): dense for `warmup` steps, then
    `sparse` steps at the target and `dense` steps without masks, and so on; at the target for good once `end` steps are
    done.

    Example:
        >>> from qmoe_core.sparsify import ACDC
        >>> schedule = ACDC(warmup=2, sparse=2, dense=1, end=7)
        >>> [schedule.sparsity(step, 0.9) for step in range(10)]
        [0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    """

    warmup: int
    sparse: int
    dense: int
    end: int

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        _check(self.warmup >= 0 and self.sparse >= 1 and self.dense >= 1, "phases take at least a step", self)
        _check(self.end >= self.warmup, "weights are masked for good only behind the dense start", self)

    def _compressed(self, done: int) -> bool:
        """Whether weights are masked once so many steps are done."""
        if done < self.warmup or done >= self.end:
            return done >= self.end
        return (done - self.warmup) % (self.sparse + self.dense) < self.sparse

    def sparsity(self, step: int, target: float) -> float:
        return target if self._compressed(step + 1) else 0.0

    def changes(self, step: int) -> bool:
        return self._compressed(step + 1) != self._compressed(step)
