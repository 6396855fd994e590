"""One decoder layer on its way from original to compressed: the stages that `pipeline.py` describes."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import QmoeError
from ..families import FUSED_PARAMETERS, Target
from ..quantize import StackStatistics
from ..quantize.feedback import output_error
from ..source import CheckedReader
from .buffers import States
from .experts import ExpertsStage
from .linears import LinearStatistics
from .skeleton import replaced_forwards
from .tap import ExpertsTap
from .treatment import Made, StackResult
from .weights_ahead import Piece

if TYPE_CHECKING:
    from .pipeline import Pipeline

NOISE = 0.05  # relative change of a weight that tells what its errors do


@dataclass(frozen=True)
class LayerResult:
    """A finished layer: its quantized stacks, which may still grow behind the computation (`Pipeline.behind`).

    Where layers are measured, `routed` is the energy of the layer's output over what it is without the routed experts,
    and the last one's `gains` are those of all layers (`probes.py`).
    """

    index: int
    stacks: list[StackResult]
    routed: float = 1.0
    gains: list[float] | None = None


class Layer:
    """One layer on its way through the stages."""

    def __init__(self, pipeline: Pipeline, index: int, done: int) -> None:
        self.p, self.index, self.done = pipeline, index, done
        self.path = pipeline.skeleton.layer_path(index)
        self.module = pipeline.skeleton.layers[index]
        self.original: nn.Module | None = None
        self.targets = pipeline.targets.get(index, [])
        self.fused = {target.module for target in self.targets if target.kind == "experts"}
        self.results: dict[str, StackResult] = {}
        for target in self.targets:
            if target.name in pipeline.decisions:
                reader = CheckedReader(pipeline.checkpoint)
                self.results[target.name] = pipeline.decisions[target.name][1].result(target, reader)
        self.left_out = [f"{module}.{parameter}" for module in self.fused for parameter in FUSED_PARAMETERS]
        # What else the layer has, if that is read before it is needed.
        self.rest = pipeline.skeleton.weights.sources(self.path, self.left_out) if pipeline.weights.ahead else []
        self.rest_piece = Piece(self._read_rest)
        self.experts = {module: self._experts_stage(module) for module in sorted(self.fused)}
        self.taps: dict[str, list[ExpertsTap]] = {}  # by module: of the compressed layer, and of the original one
        self.quantized: list[tuple[StackResult, Made]] = []  # linear layers, not yet taken
        self.energy = 0.0  # of the layer's output, per token, without the routed experts
        self.routed = 1.0

    def _relative(self, module: str) -> str:
        return module.removeprefix(f"{self.path}.")

    def _tell(self, part: float, detail: str) -> None:
        pipeline = self.p
        here = int(pipeline.bytes[self.index] * part)
        pipeline.tell(self.done + here, sum(pipeline.bytes), detail)

    def _experts_stage(self, module: str) -> ExpertsStage:
        by_parameter = {target.parameter: target for target in self.targets if target.module == module}
        first = by_parameter.get("gate_up_proj") or by_parameter["up_proj"]
        experts_bytes = sum(
            self.p.checkpoint.tensors[name].nbytes
            for target in (first, by_parameter["down_proj"])
            for name in target.source_names
        )
        share = experts_bytes / max(1, self.p.bytes[self.index])
        return ExpertsStage(
            self.module.get_submodule(self._relative(module)),
            first,
            by_parameter["down_proj"],
            self.results,
            self.p.checkpoint.read,
            self.p.weights,
            device=self.p.device,
            chunk_bytes=self.p.spec.chunk_on(self.p.device),
            gate_weighted=self.p.spec.gate_weighted,
            group=self.p.group,
            behind=self.p.behind,
            drift=self.p.spec.drift,
            measure=self.p.measure,
            observe=self.p.observe,
            tell=lambda done, total: self._tell(share * done / total, f"{module} ({done} of {total} experts)"),
        )

    def reserve(self) -> None:
        for stage in self.experts.values():
            stage.reserve()

    def pieces(self) -> list[Piece]:
        """The weights that will be asked for, in that order."""
        experts = [piece for stage in self.experts.values() for piece in stage.pieces]
        return [self.rest_piece, *experts] if self.rest else experts

    def _read_rest(self) -> list[torch.Tensor]:
        return [self.p.checkpoint.read(name).to(self.p.device) for name in self.rest]

    @torch.no_grad()
    def run(self) -> LayerResult:
        pipeline = self.p
        replaced = self._fill()
        try:
            if pipeline.spec.drift:
                self.original = copy.deepcopy(self.module)
            for result in self.results.values():
                if result.target.kind == "linear" and not result.treatment.needs_statistics:
                    self._quantize_linear(result, None)
            self._take_linears()
            self._make_taps()
            with ExitStack() as stack:
                for number, module in enumerate(m for m in (self.module, self.original) if m is not None):
                    forwards = {module.get_submodule(self._relative(k)): taps[number] for k, taps in self.taps.items()}
                    stack.enter_context(replaced_forwards(forwards))
                for name in self._stages():
                    if isinstance(name, str):
                        self._experts(name)
                    else:
                        self._linears(name)
                self._write()
        finally:
            for taps in self.taps.values():
                for tap in taps:
                    tap.close()
            pipeline.skeleton.weights.release(replaced)
        self._tell(1.0, self.path)
        ordered = [self.results[target.name] for target in self.targets if target.name in self.results]
        return LayerResult(self.index, ordered, self.routed)

    # Running the layer.

    def _fill(self) -> dict[str, nn.Parameter]:
        """Puts into the module all that it has but the experts' weights. Returns what `release` takes."""
        p = self.p
        there = dict(zip(self.rest, p.weights.next(self.rest_piece), strict=True)) if self.rest else {}

        def read(name: str, index: int | None) -> torch.Tensor:
            return there[name] if name in there else p.checkpoint.read(name, index)

        return p.skeleton.weights.fill(self.path, self.left_out, p.device, p.dtype, read)

    def _make_taps(self) -> None:
        rows = self.p.ids.numel()
        for number, module in enumerate(sorted(self.fused)):
            for stream in ("compressed", "original")[: 1 if self.original is None else 2]:
                spill = self.p.directory / f"experts-{number}-{stream}{self.p.group.suffix}"
                counted = self.p.counted * self.p.ids.shape[1]
                tap = ExpertsTap(module, rows, self.p.budget, spill, counted, self.p.device)
                self.taps.setdefault(module, []).append(tap)

    def _call(self, module: nn.Module, states: States, first: int, last: int) -> torch.Tensor:
        """The layer on some windows, (n, window, ...) float32 on the device."""
        hidden = states.read(self.index, first, last).clone().to(self.p.device, self.p.dtype)
        out = module(hidden, **self.p.arguments[last - first][self.index])
        out = out[0] if isinstance(out, tuple) else out
        if not isinstance(out, torch.Tensor) or out.shape != hidden.shape:
            raise QmoeError("E_LAYOUT", "calibration expects a layer to return activations of its input's shape",
                            tensor=self.path, expected=tuple(hidden.shape))  # fmt: skip
        return out.float()

    def _pass(self, statistics: LinearStatistics | None = None, write: bool = False) -> float:
        """Runs the layer on all windows, the original one (if there is one) before the compressed one. Returns the mean
        squared norm of the compressed one's output per token, of all processes."""
        pipeline = self.p
        energy = torch.zeros((), dtype=torch.float64, device=pipeline.device)  # there: every look at it would wait
        for first, last in pipeline.batches(counted=statistics is not None):
            for taps in self.taps.values():
                for tap in taps:
                    tap.position = first * pipeline.ids.shape[1]
            if self.original is not None:
                states = pipeline.streams["original"]
                with ExitStack() as stack:
                    if statistics is not None:
                        stack.enter_context(statistics.original(self.original, self.path))
                    out = self._call(self.original, states, first, last)
                if write:
                    states.write(first, out)
            states = pipeline.streams["compressed"]
            with ExitStack() as stack:
                if statistics is not None:
                    stack.enter_context(statistics.compressed(self.module, self.path))
                out = self._call(self.module, states, first, last)
            energy += out[: max(0, pipeline.counted - first)].square().sum(dtype=torch.float64)
            if write:
                if pipeline.probes is not None:
                    pipeline.probes.disturb(self.index, first, states.read(self.index, first, last), out)
                states.write(first, out)
        sums = pipeline.group.gather_all((float(energy), pipeline.counted * pipeline.ids.shape[1]))
        return sum(energy for energy, _ in sums) / sum(tokens for _, tokens in sums)

    def _stages(self) -> list[str | list[Target]]:
        """What to do in which order: the path of an experts module, or calibrated linear layers that are called one
        after the other. Found by running one batch; linear layers that it never calls come last."""
        linears = [
            result.target
            for result in self.results.values()
            if result.target.kind == "linear" and result.treatment.needs_statistics
        ]
        calls: list[Any] = []
        handles = []
        parts: list[str | Target] = [*sorted(self.fused), *linears]
        if not linears and len(parts) == 1:
            return [*self.fused]
        for what in parts:
            path = what if isinstance(what, str) else what.module
            module = self.module.get_submodule(self._relative(path))

            def note(_: nn.Module, arguments: Any, what: Any = what) -> None:
                if what not in calls:
                    calls.append(what)

            handles.append(module.register_forward_pre_hook(note))
        if self.results or self.fused:
            self._set_taps("skip")
            first, last = next(self.p.batches())
            self._call(self.module, self.p.streams["compressed"], first, last)
        for handle in handles:
            handle.remove()
        stages: list[str | list[Target]] = []
        for what in [*calls, *(part for part in parts if part not in calls)]:
            if isinstance(what, str):
                stages.append(what)
            elif stages and isinstance(stages[-1], list):
                stages[-1].append(what)
            else:
                stages.append([what])
        return stages

    def _set_taps(self, mode: str) -> None:
        """The mode of all taps that have no outputs to replay yet."""
        for taps in self.taps.values():
            for tap in taps:
                tap.mode = mode if tap.outputs is None else "replay"

    # Stages.

    def _linears(self, targets: list[Target]) -> None:
        statistics = LinearStatistics(targets, self.p.device, self.p.spec.drift)
        self._set_taps("skip")
        self._pass(statistics)
        statistics.share(self.p.group)
        for target in targets:
            self._quantize_linear(self.results[target.name], statistics)
        self._take_linears()
        self._tell(0.0, targets[-1].module)

    def _quantize_linear(self, result: StackResult, statistics: LinearStatistics | None) -> None:
        """Quantizes a linear layer and goes on with the quantized weight."""
        target = result.target
        used = self.module.get_submodule(self._relative(target.module))._parameters["weight"]
        assert used is not None
        group = self.p.group
        treatment = result.treatment
        pairs: Made = []
        owner = 0 if statistics is None else statistics.owner(target, group)
        if group.rank == owner:
            (weight,) = target.matrices(result.reader.read)
        if self.p.measure is not None:
            if statistics is not None and group.rank == owner:
                self._measure_linear(target, weight.to(self.p.device), used, statistics.of(target))
            return
        if statistics is not None:
            result.tokens.append(statistics.tokens[target.name])
        if group.rank == owner:
            if statistics is None:
                pairs = [treatment.of_matrix(weight, target.source_names[0])]
            else:
                name = target.source_names[0]
                pairs = treatment.of_stack(weight[None].to(self.p.device), statistics.of(target), name)
            whole = torch.empty(1, *used.shape, device=used.device)
            treatment.restore(pairs, whole)
            used.copy_(whole[0])
        group.copy_from(used, owner)
        self.quantized.append((result, pairs))

    def _take_linears(self) -> None:
        """Brings the linear layers quantized so far to the leading process, behind the computation."""
        quantized, self.quantized, aside = self.quantized, [], self.p.aside

        def take() -> None:
            for result, pairs in quantized:
                result.take(aside.gather(result.part(pairs, aside.threads)))

        if quantized:
            self.p.behind.do(take)

    def _measure_linear(
        self, target: Target, weight: torch.Tensor, used: torch.Tensor, statistics: StackStatistics
    ) -> None:
        """Measures a linear layer. What an error in its outputs does to the layer's own output is not known in advance,
        unlike that of an expert: a small random change of the weight tells, on the first windows."""
        assert self.p.measure is not None
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(weight.shape, generator=generator).to(weight) * (NOISE * weight.square().mean().sqrt())
        first, last = next(self.p.batches())
        states = self.p.streams["compressed"]
        before = self._call(self.module, states, first, last)
        kept = used.clone()
        used.copy_(weight + change)
        moved = self._call(self.module, states, first, last) - before
        used.copy_(kept)
        share = moved.square().sum(dtype=torch.float64) / before.square().sum(dtype=torch.float64)
        energy = output_error(change[None], statistics.hessian) / statistics.tokens.clamp(min=1)
        importance = (share / energy.clamp(min=1e-30)).float().unsqueeze(1).expand(1, target.shape[1])
        self.p.measure(target, weight[None], replace(statistics, row_importance=importance), torch.ones(1))

    def _experts(self, module: str) -> None:
        self._set_taps("skip")
        taps = self.taps[module]
        for tap in taps:
            tap.mode = "record"
        stage = self.experts.pop(module)  # with all that it has of its layer in memory
        self.energy = self._pass()
        stage.run(taps[0], taps[1] if len(taps) > 1 else None, self.energy)

    def _write(self) -> None:
        """Makes the next layer's inputs."""
        if not self.p.writes(self.index):
            return
        committing = self.p.kept == self.index
        keep = self.p.keeps(self.index + 1)
        if keep or committing:
            self.p.wait_for_kept(durable=keep)
        if keep:
            self.p.group.barrier()  # what is overwritten here nobody needs once the inputs kept last are in the journal
        for states in self.p.streams.values():
            states.begin(self.index + 1, keep)
        self._set_taps("replay")
        energy = self._pass(write=True)
        if self.energy > 0:
            self.routed = energy / self.energy
