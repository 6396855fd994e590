"""The optimizer loop that both modes share, and its state on the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..errors import QmoeError
from ..store import crc32c, io_errors, write_atomic
from .spec import RecoverySpec
from .tunables import Tunables

State = dict[str, torch.Tensor]
Loss = Callable[[np.ndarray], torch.Tensor]  # of the windows with these numbers


def save_state(path: Path, state: State) -> None:
    """Writes tensors durably, whole or not at all: a safetensors file behind its CRC-32C."""
    from safetensors.torch import save

    data = save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()})
    write_atomic(path, b"%08x" % crc32c(data) + data)


def load_state(path: Path) -> State | None:
    """What `save_state` wrote, or None if there is no such file. Raises `E_CHECKSUM`, `E_IO`."""
    from safetensors.torch import load

    if not path.exists():
        return None
    with io_errors(path):
        data = path.read_bytes()
    if data[:8] != b"%08x" % crc32c(data[8:]):
        raise QmoeError("E_CHECKSUM", "the state of the recovery is damaged; delete the output directory", file=path)
    return load(data[8:])


@contextmanager
def arithmetic(device: str, dtype: str) -> Iterator[None]:
    """Forward passes inside the block compute as `RecoverySpec.dtype` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def learning_rate(step: int, spec: RecoverySpec) -> float:
    """The share of the peak rate at a step: a linear rise, then a cosine to zero."""
    warmup = spec.warmup * spec.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, spec.steps - warmup)))


def windows_of_step(step: int, count: int, spec: RecoverySpec) -> np.ndarray:
    """Which of `count` windows a step sees: epoch after epoch in an order that depends on seed and epoch alone."""
    batch = min(spec.batch, count)
    per_epoch = count // batch
    epoch, at = divmod(step, per_epoch)
    order = np.random.default_rng((spec.seed, epoch)).permutation(count)
    return np.sort(order[at * batch : (at + 1) * batch])


class Trainer:
    """AdamW on `tunables`, without weight decay: zero is where a parameter began."""

    def __init__(self, tunables: Tunables, spec: RecoverySpec, state: State | None = None) -> None:
        """`state`: to continue from, as `state` returned it."""
        self.tunables, self.spec = tunables, spec
        self.optimizer = torch.optim.AdamW(tunables.groups(spec), betas=(0.9, 0.95), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.losses = 0, list[float]()
        self.mean: State = {}
        if state is not None:
            self._restore(state)
        elif spec.average:
            self.mean = {key: p.detach().clone() for key, p in tunables.parameters.items()}

    def state(self) -> State:
        """Everything that continuing needs."""
        result = {"step": torch.tensor(self.step), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for key, parameter in self.tunables.parameters.items():
            result[f"value/{key}"] = parameter.detach()
            if key in self.mean:
                result[f"mean/{key}"] = self.mean[key]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                result[f"{name}/{key}"] = value
        return result

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        self.step, self.losses = int(state["step"]), state["losses"].tolist()
        for key, parameter in self.tunables.parameters.items():
            parameter.copy_(state[f"value/{key}"])
            if f"mean/{key}" in state:
                self.mean[key] = state[f"mean/{key}"].to(parameter.device)
            if f"exp_avg/{key}" in state:
                self.optimizer.state[parameter] = {
                    "step": state[f"step/{key}"],
                    "exp_avg": state[f"exp_avg/{key}"].to(parameter.device),
                    "exp_avg_sq": state[f"exp_avg_sq/{key}"].to(parameter.device),
                }

    def run(self, loss_of: Loss, count: int, where: str, after: Callable[[Trainer], None]) -> None:
        """All steps that are left; `after` is called behind each.

        Raises:
            QmoeError: E_VALUE for a loss or gradient that is not finite, naming `where` and the step.
        """
        parameters = list(self.tunables.parameters.values())
        while self.step < self.spec.steps:
            factor = learning_rate(self.step, self.spec)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of(windows_of_step(self.step, count, self.spec))
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.spec.clip or math.inf)
            value, length = loss.item(), norm.item()
            if not (math.isfinite(value) and math.isfinite(length)):
                raise QmoeError(
                    "E_VALUE",
                    f"recovery diverged in step {self.step}{where}: the loss or its gradient is not finite; "
                    "try smaller learning rates",
                    expected="finite",
                    actual=f"loss {value}, gradient {length}",
                )
            self.optimizer.step()
            self.step += 1
            self.losses.append(value)
            self._average()
            after(self)

    @torch.no_grad()
    def _average(self) -> None:
        # The average forgets its start quickly at first, so that few steps give a fair one too.
        decay = min(self.spec.average, self.step / (self.step + 10))
        for key, mean in self.mean.items():
            mean.lerp_(self.tunables.parameters[key], 1 - decay)

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the averaged parameters, where there are any, into the model."""
        for key, mean in self.mean.items():
            self.tunables.parameters[key].copy_(mean)
