"""Layer by layer through a model that need not fit into memory: run, collect, quantize, go on with what came out.

In memory are one layer's weights (of its experts one chunk), the activations of all calibration tokens (or files that
hold them), and the statistics of one stage. Every layer sees the activations that the already compressed layers before
it produce, so later layers correct for the errors of earlier ones.

A layer goes through stages in the order in which it calls its parts, each one a pass over all windows:
    linears  the Hessians of linear layers' inputs; those are then quantized
    experts  the inputs of the experts are recorded; the experts are quantized chunk by chunk (`experts.py`)
    write    the layer, compressed, makes the next layer's inputs

What is to be durable of a layer becomes so behind the computation of the next ones: `behind` collects what the
processes have made of it, then `keeping` packs and writes that, while the next layer's is collected. Quantized matrices
wait in `behind`, too, those of two chunks of experts at most. Activations are made durable every now and then only:
those of a fast layer are gigabytes that would take longer to write than to make again. No layer overwrites durable ones
before later ones are durable, and all that came before those.

Several processes (`distributed.py`) have a contiguous part of the windows each, with the activations of these, and
nothing else is divided up but reading the experts' weights and the quantization. All sums are sums over the processes,
in the order in which gloo or NCCL adds them: the result is that of one process but for the order of summation, and the
same in every run with as many processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..behind import Behind
from ..errors import QmoeError
from ..families import ModelLayout, Target
from ..source import SourceCheckpoint
from .buffers import Budget, States
from .distributed import Group
from .experts import Measure, Observe
from .layer import Layer, LayerResult
from .probes import Probes
from .skeleton import Arguments, Skeleton, cast_arguments, same_arguments
from .spec import CalibrationSpec
from .treatment import Treatment
from .weights_ahead import WeightsAhead

KEEP_SECONDS = 10.0  # a kill loses at most so much of finished work, and the layer that it comes in
AHEAD = 4  # things that wait in `Pipeline.behind`: two for every chunk of experts
Decisions = Mapping[str, tuple[Target, Treatment]]  # by target name: what is to be compressed, and how


def check_device(device: str) -> str:
    """The device, if it is a CPU or a CUDA device that is there. Raises `E_NO_KERNEL`."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise QmoeError("E_NO_KERNEL", "unknown device", expected=["cpu", "cuda"], actual=device) from error
    if kind not in ("cpu", "cuda"):
        raise QmoeError("E_NO_KERNEL", "calibration does not run on this device", expected=["cpu", "cuda"], actual=kind)
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise QmoeError(
            "E_NO_KERNEL", "no CUDA device is available", expected="a CUDA device", actual=torch.__version__
        )
    return device


class Pipeline:
    """One run over the layers. `close` it, or use it as a context manager.

    Attributes:
        count: how many layers are run: those up to the last one with a calibrated method. What is to be compressed
            behind them (with data-free methods) is left to the caller.
        behind: does things in a thread. aside: `group`, for use by that thread. keeping: what that thread passes on.
        kept: the layer whose inputs are the last that are to become durable, or that all began with. keep: makes them
            so, in `behind`; on the leading process its result is what is then done in `keeping`. None: they are.
        weights: reads experts' weights ahead.
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layout: ModelLayout,
        decisions: Decisions,
        ids: np.ndarray,
        spec: CalibrationSpec,
        device: str,
        directory: Path,
        tell: Callable[[int, int, str], None],
        group: Group,
        measure: Measure | None = None,
        observe: Observe | None = None,
    ) -> None:
        """
        Args:
            ids: (windows, window) int64 token ids of all processes.
            directory: for activations and what does not fit in memory.
            tell: progress: bytes of the source done and in total, and where.
            group: the processes that share the windows.
            measure: where given, nothing is compressed: every layer, to the last, sees the original's activations, and
                this is called with the matrices that would be compressed and their statistics, on the process that owns
                them. The last layer's result then has the gains of all (`probes.py`).
            observe: gets the outputs of the experts of every layer, to the last; not together with `drift`.

        Raises:
            QmoeError: `E_LAYOUT` for a model that cannot be run layer by layer, or with a calibrated target outside of
                its decoder layers.
        """
        self.checkpoint, self.decisions, self.spec, self.group = checkpoint, decisions, spec, group
        self.measure, self.observe = measure, observe
        windows = group.part(range(len(ids)))
        self.ids = torch.tensor(ids[windows.start : windows.stop])
        self.device, self.directory, self.tell = check_device(device), directory, tell
        self.dtype = getattr(torch, spec.dtype)
        self.skeleton = Skeleton(checkpoint.directory, layout, checkpoint, device)
        self.targets: dict[int, list[Target]] = {}
        calibrated = -1
        for target in layout.targets:
            layer = self.skeleton.layer_of(target.name)
            if layer is not None:
                self.targets.setdefault(layer, []).append(target)
            if target.name in decisions and decisions[target.name][1].needs_statistics:
                if layer is None:
                    raise QmoeError(
                        "E_LAYOUT",
                        "calibration reaches only the decoder layers; give this weight a data-free method",
                        tensor=target.name,
                        expected=f"below {self.skeleton.path}",
                    )
                calibrated = max(calibrated, layer)
        self.count = calibrated + 1
        self.counted = len(self.ids)  # windows that statistics are taken of; behind them are copies for probes
        self.probes: Probes | None = None
        if observe is not None:
            self.count = len(self.skeleton.layers)
        if measure is not None:
            self.count = len(self.skeleton.layers)
            self.probes = Probes(self.count, self.ids)
            self.ids = self.probes.extended(self.ids)
        self.bytes = self._layer_bytes(layout)
        self.arguments: dict[int, list[Arguments]] = {}  # by batch size, then by layer
        self.budget = Budget(spec.buffer_bytes)
        self.streams: dict[str, States] = {}
        self.kept, self._kept_at = 0, time.monotonic()
        self.keep: Future[Future[None] | None] | None = None
        self.weights, self._coming = WeightsAhead(device), dict[int, Layer]()
        self.behind, self.keeping, self.aside = Behind(ahead=AHEAD), Behind(ahead=1), group.aside()

    def _layer_bytes(self, layout: ModelLayout) -> list[int]:
        result = [0] * self.count
        for name, runtime in layout.runtime_names.items():
            layer = self.skeleton.layer_of(runtime)
            if layer is not None and layer < self.count:
                result[layer] += self.checkpoint.tensors[name].nbytes
        return result

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for behind in (self.behind, self.keeping):
            behind.close(drop=self.group.size > 1)  # a finished layer is worth keeping, but others may have failed
        self.weights.close()
        for states in self.streams.values():
            states.close()

    def settle(self) -> None:
        """Waits until all that is under way behind the computation is done."""
        self.behind.wait()
        self.keeping.wait()  # only `behind` adds to it

    def wait_for_kept(self, durable: bool) -> None:
        """Waits until the inputs of `kept` are in the files; `durable`: and on the leading process until the journal
        says so."""
        noted = None if self.keep is None else self.behind.result(self.keep)
        if durable and noted is not None:
            self.keeping.result(noted)

    # Activations.

    def batches(self, counted: bool = False) -> Iterator[tuple[int, int]]:
        """(first, last) windows of each batch; `counted`: of windows that statistics are taken of only. No batch has
        windows of both kinds."""
        ends = [self.counted] if counted or self.counted == len(self.ids) else [self.counted, len(self.ids)]
        start = 0
        for end in ends:
            for first in range(start, end, self.spec.batch_size):
                yield first, min(first + self.spec.batch_size, end)
            start = end

    @torch.no_grad()
    def begin(self, layer: int, crcs: dict[str, int]) -> bool:
        """Makes the inputs of `layer` available: 0 starts anew; a later one takes up what a killed run left durable,
        whose CRC32C by stream are `crcs`. False if that is not sound."""
        names = ["compressed", "original"] if self.spec.drift else ["compressed"]
        suffix, self.arguments = self.group.suffix, {}
        self.kept, self.keep, self._kept_at = layer, None, time.monotonic()
        self.weights.clear()
        self._coming.clear()
        if layer < self.count:
            coming = self._layer(layer)  # its weights are read meanwhile
            if self.device.startswith("cuda"):
                self.behind.do(coming.reserve)
        for states in self.streams.values():
            states.begin(layer, False)
        with self.skeleton.surroundings():
            for first, last in self.batches():
                if layer > 0 and last - first in self.arguments:
                    continue
                hidden, arguments = self.skeleton.trace(self.ids[first:last])
                if not self.streams:
                    shape = tuple(hidden.shape[1:])
                    for name in names:
                        stem = f"activations-{name}{suffix}"
                        self.streams[name] = States(
                            self.directory, stem, len(self.ids), shape, self.budget, self.device
                        )
                known = self.arguments.setdefault(last - first, arguments)
                if not all(map(same_arguments, known, arguments)):
                    raise QmoeError(
                        "E_LAYOUT",
                        "calibration does not support a model whose layers get arguments that depend on the tokens",
                        actual=type(self.skeleton.model).__name__,
                    )
                if layer == 0:
                    for states in self.streams.values():
                        states.write(first, hidden)
        self.arguments = {size: cast_arguments(value, self.dtype) for size, value in self.arguments.items()}
        return layer == 0 or all(states.restore(layer, crcs.get(name, -1)) for name, states in self.streams.items())

    def layers(self, start: int) -> Iterator[LayerResult]:
        """Runs the layers from `start`, whose inputs `begin` has made available. Before the next one is asked for,
        `commit` must be under way in `behind`, where the layer `keeps` what it has written."""
        for index in range(start, self.count):
            layer = self._layer(index)
            if index + 1 < self.count:
                self._layer(index + 1)
            result = layer.run()
            del self._coming[index], layer
            if self.probes is not None and index + 1 == self.count:
                result = replace(result, gains=self._gains(self.probes))
            yield result

    def _layer(self, index: int) -> Layer:
        """A layer that comes next or behind that; reading its weights is planned."""
        if index not in self._coming and index < self.count:
            self._coming[index] = Layer(self, index, sum(self.bytes[:index]))
            self.weights.plan(self._coming[index].pieces())
        return self._coming[index]

    def writes(self, index: int) -> bool:
        """Whether a layer makes inputs of the next one; behind the last layer nobody needs them, but measuring takes
        their energy."""
        return index + 1 < self.count or self.measure is not None

    def keeps(self, layer: int) -> bool:
        """Whether the inputs of `layer` are to become durable: the same for all processes."""
        due = time.monotonic() - self._kept_at >= KEEP_SECONDS and (layer - self.kept) % 2 == 1
        spilled = not all(states.in_memory for states in self.streams.values())
        found = self.group.gather_all((due, spilled))
        if found[0][0] or any(spilled for _, spilled in found):
            self.kept, self._kept_at = layer, time.monotonic()
        return self.kept == layer

    def commit(self) -> dict[str, int]:
        """Makes what the last layer has written durable; the CRC32C by stream."""
        return {name: states.commit() for name, states in self.streams.items()}

    @torch.no_grad()
    def _gains(self, probes: Probes) -> list[float]:
        """The mean over the processes, which have different windows."""
        states = self.streams["compressed"]
        with self.skeleton.surroundings(head=True):
            gains = probes.gains(lambda window: states.read(self.count, window, window + 1)[0], self.skeleton.predict)
        return np.mean(self.group.gather_all(gains), axis=0).tolist()
