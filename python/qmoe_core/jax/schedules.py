"""When masks change, and how sparse they are then. Names, arguments and steps are those of JaxPruner."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import QmoeError
from .trees import Tree, map_leaves


@dataclass(frozen=True)
class NoUpdateSchedule:
    """Masks never change.

    Example:
        >>> from qmoe_core.jax import NoUpdateSchedule
        >>> bool(NoUpdateSchedule().is_mask_update_iter(100))
        False
    """

    def get_sparsity_at_step(self, target_sparsities: Tree, step: Any) -> Tree:
        """The sparsities of step `step`, counted from 0; leaves that are None stay None."""
        del step
        return target_sparsities

    def is_mask_update_iter(self, step: Any) -> Any:
        """Whether masks change at this step. bool, or a bool array."""
        del step
        return False


@dataclass(frozen=True)
class OneShotSchedule(NoUpdateSchedule):
    """Masks change once, at `target_step`; before, nothing is sparse.

    Example:
        >>> from qmoe_core.jax import OneShotSchedule
        >>> [bool(OneShotSchedule(5).is_mask_update_iter(step)) for step in (4, 5, 6)]
        [False, True, False]
    """

    target_step: int

    def get_sparsity_at_step(self, target_sparsities: Tree, step: Any) -> Tree:
        pruned = jnp.asarray(step) >= self.target_step
        return map_leaves(
            lambda target: None if target is None else jnp.where(pruned, target, jnp.zeros_like(target)),
            map_leaves(_array, target_sparsities),
        )

    def is_mask_update_iter(self, step: Any) -> Any:
        return step == self.target_step


@dataclass(frozen=True)
class PeriodicSchedule(NoUpdateSchedule):
    """Masks change at all steps from `update_start_step` to `update_end_step` (None: for ever) that `update_freq`
    divides. Raises `E_VALUE` for a period below 1 or an end before the start.

    Example:
        >>> from qmoe_core.jax import PeriodicSchedule
        >>> [step for step in range(50) if PeriodicSchedule(10, 20, 40).is_mask_update_iter(step)]
        [20, 30, 40]
    """

    update_freq: int
    update_start_step: int
    update_end_step: int | None

    def __post_init__(self) -> None:
        if self.update_freq < 1:
            raise QmoeError("E_VALUE", "update_freq is at least 1", actual=self.update_freq)
        if self.update_end_step is not None and self.update_end_step < self.update_start_step:
            raise QmoeError(
                "E_VALUE", "update_end_step is before update_start_step", expected=f">= {self.update_start_step}",
                actual=self.update_end_step,
            )  # fmt: skip

    def is_mask_update_iter(self, step: Any) -> Any:
        if step is None:
            return False
        due = (step % self.update_freq == 0) & (step >= self.update_start_step)
        return due if self.update_end_step is None else due & (step <= self.update_end_step)


@dataclass(frozen=True)
class PolynomialSchedule(PeriodicSchedule):
    """Sparsity grows from 0 to S as S (1 - (1 - p)^power) (Zhu and Gupta, arXiv 1710.01878).

    p = (step + 1 - start) / (end - start), between 0 and 1: JaxPruner counts the step that has just been taken, so that
    the first change already prunes and the target is reached at `update_end_step` - 1. If no change comes then or
    later, the target is never reached; making such a schedule warns.

    Example:
        >>> from qmoe_core.jax import PolynomialSchedule
        >>> schedule = PolynomialSchedule(update_freq=5, update_start_step=0, update_end_step=10)
        >>> [round(float(schedule.get_sparsity_at_step(0.8, step)), 4) for step in (0, 5, 9, 10)]
        [0.2168, 0.7488, 0.8, 0.8]
    """

    power: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_end_step is None:
            raise QmoeError("E_VALUE", "a polynomial schedule needs update_end_step")
        last = self.update_end_step // self.update_freq * self.update_freq
        if last < self.update_start_step or (
            self.update_start_step < self.update_end_step and last < self.update_end_step - 1
        ):
            reached = f"the last update is at step {last}" if last >= self.update_start_step else "no step is an update"
            warnings.warn(
                f"this schedule never reaches its target: {reached}, {self.update_freq} steps apart, and the target "
                f"at step {self.update_end_step - 1}",
                stacklevel=3,
            )

    def get_sparsity_at_step(self, target_sparsities: Tree, step: Any) -> Tree:
        assert self.update_end_step is not None
        length = self.update_end_step - self.update_start_step
        if length == 0:
            progress: Any = 1.0
        else:
            progress = jnp.clip(step + 1 - self.update_start_step, 0, length).astype(jnp.float32) / jnp.float32(length)
        share = 1.0 - (1.0 - progress) ** self.power
        return map_leaves(lambda target: None if target is None else target * share, target_sparsities)


def _array(value: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(value, jnp.float32)
