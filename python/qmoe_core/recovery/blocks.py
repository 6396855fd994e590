"""Matching the original's decoder layers one by one, with one layer of each model in memory.

A layer gets what the recovered layers before it produce and is tuned to return what the original's layer returns for
the original's inputs, so that later layers also correct for the errors of earlier ones (compare AQLM's block tuning,
arXiv 2401.06118). Only tensors inside the layers are tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.buffers import Budget, RowBuffer
from ..calibration.skeleton import Arguments, Skeleton, same_arguments
from ..errors import QmoeError
from ..families import ModelLayout
from ..progress import ProgressEvent
from ..runtime.experts import PackedExperts
from ..runtime.linear import PackedLinear
from ..runtime.packed import PackedShape
from ..source import SourceCheckpoint
from .modules import make_tunable
from .spec import RecoverySpec
from .training import Trainer, arithmetic, load_state, save_state
from .tunables import PlainTensor, Tunables, Values
from .writing import record_of

MEMORY = 8 << 30  # bytes of activations that stay in memory; more go to files


class Blocks:
    """One run over the layers. `count`: how many there are."""

    def __init__(
        self,
        original: SourceCheckpoint,
        packed: SourceCheckpoint,
        layout: ModelLayout,
        plain: list[PlainTensor],
        windows: torch.Tensor,
        spec: RecoverySpec,
        device: str,
        scratch: Path,
        progress: Callable[[ProgressEvent], None] | None,
    ) -> None:
        self.packed, self.plain, self.windows, self.spec = packed, plain, windows, spec
        self.device, self.scratch, self.progress = device, scratch, progress
        self.teacher = Skeleton(original.directory, layout, original, device)
        self.student = Skeleton(original.directory, layout, packed, device)
        self.targets = [target for target in layout.targets if target.packed_name in packed.tensors]
        self.count = len(self.teacher.layers)
        # Validation takes whole batches: a layer's other arguments were made for their size.
        self.held_out = -(-spec.validation // spec.batch) * spec.batch
        if self.held_out >= len(windows):
            raise QmoeError(
                "E_VALUE", "too few tokens for validation and one step",
                expected=f">= {(self.held_out + spec.batch) * spec.window}", actual=windows.numel(),
            )  # fmt: skip
        for tensor in plain:
            if self.student.layer_of(tensor.runtime) is None and tensor.kind not in ("norms", "other"):
                raise QmoeError("E_VALUE", "mode 'block' tunes tensors inside layers only", tensor=tensor.name)

    def run(self) -> tuple[float, float, list[float], Values, dict[str, int]]:
        """Mean loss of the layers before and after, all losses, what was found, and how many parameters were tuned."""
        spec, total = self.spec, Values()
        arguments = self._start()
        before, after, losses, tuned = [], [], [], dict[str, int]()
        for index in range(self.count):
            scale = self._advance_teacher(index, arguments[index])
            tunables = self._load(index)
            path = self.scratch / f"layer-{index:05d}.state"
            state = load_state(path)
            loss_of = partial(self._loss, call=tunables.call, arguments=arguments[index], scale=scale)
            trainer = Trainer(tunables, spec, state)
            if state is None:
                before.append(self._measure(loss_of))

                def tell(trainer: Trainer, done: int = index * spec.steps) -> None:
                    if self.progress is not None:
                        self.progress(ProgressEvent("recover", done + trainer.step, self.count * spec.steps, "steps"))

                trainer.run(loss_of, len(self.windows) - self.held_out, f" of layer {index}", tell)
                trainer.finish()
                after.append(self._measure(loss_of))
                measured = torch.tensor([before[-1], after[-1]], dtype=torch.float64)
                save_state(path, {**trainer.state(), "measured": measured})
            else:
                before.append(float(state["measured"][0]))
                after.append(float(state["measured"][1]))
            losses += trainer.losses
            values = tunables.values()
            total.changes |= values.changes
            total.plain |= values.plain
            for kind, number in tunables.counts().items():
                tuned[kind] = tuned.get(kind, 0) + number
            self._advance_student(tunables, arguments[index])
            self._release(index)
        return sum(before) / self.count, sum(after) / self.count, losses, total, tuned

    def _start(self) -> list[Arguments]:
        """Fills both streams of activations with the first layer's inputs; returns all layers' other arguments."""
        arguments: list[Arguments] = []
        streams: list[RowBuffer] = []
        for name, skeleton in (("teacher", self.teacher), ("student", self.student)):
            with skeleton.surroundings():
                for first in range(0, len(self.windows), self.spec.batch):
                    hidden, found = skeleton.trace(self.windows[first : first + self.spec.batch])
                    if first == 0:
                        self.width = hidden.shape[-1]
                        budget = Budget(MEMORY // 2)
                        rows = self.windows.numel()
                        streams.append(RowBuffer(rows, self.width, budget, self.scratch / f"{name}.rows"))
                    arguments = arguments or found
                    if not same_arguments(arguments, found):
                        raise QmoeError("E_LAYOUT", "what the layers are called with depends on the tokens")
                    streams[-1].write(first * self.spec.window, hidden.flatten(0, -2))
        self.expected, self.actual = streams
        return arguments

    def _batch(self, stream: RowBuffer, numbers: np.ndarray) -> torch.Tensor:
        """The activations (B, window, H) of the windows with these numbers, on the device."""
        window = self.spec.window
        parts = [stream.read(number * window, (number + 1) * window) for number in numbers.tolist()]
        return torch.stack(parts).to(self.device)

    def _all(self) -> list[np.ndarray]:
        count, batch = len(self.windows), self.spec.batch
        return [np.arange(first, first + batch) for first in range(0, count, batch)]

    def _loss(self, numbers: np.ndarray, call: Any, arguments: Arguments, scale: float) -> torch.Tensor:
        with arithmetic(self.device, self.spec.dtype):
            result = _hidden(call(self._batch(self.actual, numbers), **arguments))
        return (result.float() - self._batch(self.expected, numbers)).square().mean() / scale

    @torch.no_grad()
    def _measure(self, loss_of: Callable[[np.ndarray], torch.Tensor]) -> float:
        held_out = self._all()[-(self.held_out // self.spec.batch) :]
        return sum(float(loss_of(numbers)) for numbers in held_out) / len(held_out)

    @torch.no_grad()
    def _advance_teacher(self, index: int, arguments: Arguments) -> float:
        """The original's stream goes through its layer. Returns the mean square of what the layer adds."""
        path = self.teacher.layer_path(index)
        replaced = self.teacher.weights.fill(path, (), self.device, torch.float32)
        change = 0.0
        for numbers in self._all():
            hidden = self._batch(self.expected, numbers)
            result = _hidden(self.teacher.layers[index](hidden, **arguments)).float()
            change += float((result - hidden).square().mean())
            self.expected.write(int(numbers[0]) * self.spec.window, result.flatten(0, -2))
        self.teacher.weights.release(replaced)
        return max(change / len(self._all()), 1e-30)

    @torch.no_grad()
    def _advance_student(self, tunables: Tunables, arguments: Arguments) -> None:
        for numbers in self._all():
            with arithmetic(self.device, self.spec.dtype):
                result = _hidden(tunables.call(self._batch(self.actual, numbers), **arguments))
            self.actual.write(int(numbers[0]) * self.spec.window, result.float().flatten(0, -2))

    def _load(self, index: int) -> Tunables:
        """The compressed layer with tunable modules."""
        path, layer = self.student.layer_path(index), self.student.layers[index]
        inside = [target for target in self.targets if target.name.startswith(f"{path}.")]
        by_module: dict[str, dict[str, PackedShape]] = {}
        for target in inside:
            nbytes = self.packed.tensors[target.packed_name].nbytes
            by_module.setdefault(target.module, {})[target.parameter] = PackedShape(*target.shape, nbytes)
        self.student.weights.fill(path, [target.name for target in inside], self.device, torch.float32)
        for name, shapes in by_module.items():
            template = self.student.model.get_submodule(name)
            kind = PackedLinear if isinstance(template, nn.Linear) else PackedExperts
            with torch.device("meta"):
                module = kind(template, shapes, name)  # type: ignore[arg-type]
            layer.set_submodule(name.removeprefix(f"{path}."), module)
        make_tunable(layer, lambda name: record_of(self.packed, name), f"{path}.")
        layer.to(self.device)
        plain = [
            PlainTensor(t.name, t.runtime.removeprefix(f"{path}."), t.kind, t.dtype)
            for t in self.plain
            if t.runtime.startswith(f"{path}.")
        ]
        return Tunables(layer, plain, self.spec)

    def _release(self, index: int) -> None:
        """Frees the compressed layer: it is not needed again."""
        self.student.layers[index] = nn.Identity()
        decoder_layers: Any = self.student.model.get_submodule(self.student.path)
        decoder_layers[index] = nn.Identity()


def _hidden(output: Any) -> torch.Tensor:
    """What a layer returned: the activations, bare or as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
