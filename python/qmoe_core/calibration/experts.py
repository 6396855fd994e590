"""The routed experts of one layer: their inputs, their statistics, their quantization, their outputs.

The experts module itself never runs. While its layer runs, its forward only notes what it was called with
(`ExpertsTap`); experts are then taken a chunk at a time: original weights, Hessians of the inputs, quantization of gate
and up, Hessians of what the quantized gate and up make of the inputs, quantization of down, and the outputs, which the
tap hands back when the layer runs again. So memory holds one chunk of experts (a GPU's what comes next as well), and no
matter which implementation of experts transformers would have chosen, nothing passes by unseen.

Gating and biases are the module's own, as in `runtime.experts`.

Several processes hold different tokens. Each adds up its own and quantizes its own experts, a chunk of them at a time
(`distributed.rounds`): it reads their weights, gets the sums of all processes for these, and gives the result to all,
since every process needs all quantized weights for its tokens; the original ones only where something is compared with
them. Chunks, and with them what is pooled, are those of a single process. What is quantized goes to the leading process
behind the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import _C
from ..behind import Behind
from ..families import Reader, Target
from ..quantize.base import StackStatistics
from ..quantize.feedback_cuda import reserve_host
from .distributed import Group, Round, rounds
from .sums import ROWS, add_products, add_squares, complete
from .tap import ExpertsTap
from .treatment import Made, StackResult
from .weights_ahead import Piece, WeightsAhead

SAMPLE = 1024  # tokens of an expert that tell how much its rows matter
# Bytes of what goes into down that are kept from its statistics for its outputs, on the host and on a GPU.
KEPT, KEPT_ON_GPU = 128 << 20, 2 << 30
TOGETHER = 8  # experts whose weights are converted at once on a GPU, where memory for them is no matter


# Takes a target, some of its matrices (E', N, K) float32, their statistics with `row_importance`, and by what to
# multiply an error that these give to have it as a share of the energy of the layer's output without routed experts:
# (E',) float32, 1 where tokens are weighted by the gate already.
Measure = Callable[[Target, torch.Tensor, StackStatistics, torch.Tensor], None]

# Takes the down target, the number of an expert, and of some of its tokens the routing weights (n, 1) and what the
# expert makes of them (n, H) float32, not yet weighted.
Observe = Callable[[Target, int, torch.Tensor, torch.Tensor], None]


class ExpertsStage:
    """Quantizes the experts of one module from recorded inputs and computes their outputs."""

    def __init__(
        self,
        module: nn.Module,
        first: Target,
        down: Target,
        results: dict[str, StackResult],
        read: Reader,
        weights: WeightsAhead,
        *,
        device: str,
        chunk_bytes: int,
        gate_weighted: bool,
        tell: Callable[[int, int], None],
        group: Group,
        behind: Behind,
        drift: bool = False,
        measure: Measure | None = None,
        observe: Observe | None = None,
    ) -> None:
        """
        Args:
            module: the experts module, on meta but for biases and children, which are on `device`.
            first, down: its stacks. results: by target name, for those that are to be quantized.
            read: reads source tensors. weights: reads ahead what `pieces` names, in that order.
            tell: called with experts done and in total.
            group: the processes that share the tokens.
            behind: the thread that uses `group.aside()`.
            drift: `run` will be given the original's inputs.
            measure: gets the matrices and their statistics, and nothing is quantized.
            observe: gets the outputs of all experts for the tokens of this process.
        """
        self.measure, self.observe = measure, observe
        self.module, self.first, self.down, self.results, self.read = module, first, down, results, read
        self.device, self.gate_weighted, self.tell = device, gate_weighted, tell
        self.group, self.behind, self.rows, self.energy = group, behind, 0, 0.0  # rows: tokens of all processes
        self.gates = torch.empty(0)  # (experts,): mean squared routing weight, 1 where tokens carry it already
        self.counts = torch.empty(0, 0, dtype=torch.int64)  # (processes, experts): whose tokens each expert saw
        (experts, n1, k1), (_, n2, k2) = first.shape, down.shape
        each = 4 * (2 * max(k1 * k1, k2 * k2) + 2 * n1 * k1 + 2 * n2 * k2)
        self.chunk = max(1, min(experts, chunk_bytes // each))
        if not (first.sliceable and down.sliceable):
            self.chunk = experts  # reading some of them means reading all of them
        self.rounds = rounds(experts, self.chunk, group.size)
        kept = not {first.name, down.name} <= results.keys()
        # Whether every process needs the original weights of all experts, or each only those that it quantizes.
        self.whole = drift or kept or measure is not None or (self._calibrated(first) and self._weighs_rows(first))
        self.weights = weights
        self.pieces = [Piece(partial(self._read, target, work)) for work in self.rounds for target in (first, down)]
        self._coming = iter(self.pieces)

    def reserve(self) -> None:
        """Page-locked host memory for what the GPU will make of a chunk, before there is anything."""
        most = max(len(work.shares[self.group.rank]) for work in self.rounds)
        targets = [target for target in (self.first, self.down) if self._calibrated(target) and self.measure is None]
        sizes = [most * self.results[target.name].treatment.locked_bytes(target) for target in targets]
        reserve_host([size for size in sizes if size], self.device)

    def run(self, tap: ExpertsTap, original: ExpertsTap | None, energy: float) -> None:
        """Fills `tap.outputs`, and those of `original`, the same module in the uncompressed model, if given. `energy`:
        mean squared norm of the layer's output per token, without these experts."""
        self.energy = max(energy, 1e-30)
        if tap.inputs is None:  # never called with these tokens: only data-free methods and pooled zeros remain
            tap.make_inputs(self.first.shape[2], 1)
        tap.make_outputs()
        if original is not None:
            original.make_outputs()
        experts = self.first.shape[0]
        seen = self.group.gather_all((tap.counts(experts), tap.counted))
        self.counts, self.rows = torch.stack([counts for counts, _ in seen]), sum(rows for _, rows in seen)
        pooled = self._pooled(tap) if self._calibrated(self.first) else None
        if self.measure is not None:
            self.gates = self._gates(tap)
        for work in self.rounds:
            self._round(work, tap, original, pooled)
            # What stays of every round lies between what was freed, which the allocator would keep: gigabytes a layer.
            _C.release_memory()
            self.tell(work.experts.stop, experts)

    def _calibrated(self, target: Target) -> bool:
        result = self.results.get(target.name)
        return result is not None and result.treatment.needs_statistics

    def _weighs_rows(self, target: Target) -> bool:
        return self.measure is not None or self.results[target.name].treatment.weighs_rows

    def _weights(self, target: Target, work: Round) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Original weights (experts, N, K) float32 on the device: of the experts of this process, and of all of the
        round where every process needs those."""
        (read,), mine = self.weights.next(next(self._coming)), work.places(work.shares[self.group.rank])
        if not target.sliceable:
            return read[mine], read
        if self.group.size == 1 or not self.whole:
            return read, read if self.group.size == 1 else None
        weights = torch.empty(len(work.experts), *target.shape[1:], device=self.device)
        weights[mine] = read
        self._share_out(weights, work)
        return weights[mine], weights

    def _share_out(self, stack: torch.Tensor, work: Round) -> None:
        """Gives every process all experts' entries of a stack, of which each has its own."""
        for owner, part in enumerate(work.shares):
            if len(part):
                self.group.copy_from(stack[work.places(part)], owner)

    def _read(self, target: Target, work: Round) -> list[torch.Tensor]:
        """The weights of this process's experts, or of all where none can be read without the others."""
        result, shared = self.results.get(target.name), target.sliceable
        checked = result is not None and (shared or self.group.leads)
        read = result.reader.read if checked and result is not None else self.read
        mine = work.shares[self.group.rank] if shared else work.experts
        weights = torch.empty(len(mine), *target.shape[1:], device=self.device)

        def there(name: str, index: int | None) -> torch.Tensor:
            return read(name, index).to(self.device)  # as stored, which is half of the bytes or less

        matrices = target.matrices(there, mine.start, mine.stop, TOGETHER if weights.is_cuda else 1)
        for place, matrix in zip(weights, matrices, strict=True):
            place.copy_(matrix)
        return [weights]

    def _round(self, work: Round, tap: ExpertsTap, original: ExpertsTap | None, pooled: torch.Tensor | None) -> None:
        experts, start = work.experts, work.experts.start
        own_up, up = self._weights(self.first, work)
        own_down, down = self._weights(self.down, work) if self.whole else (None, None)
        share = self._share(work)
        statistics = None
        if self._calibrated(self.first):
            statistics = self._statistics(
                work, self.first.shape[2], tap, original, lambda e, x: x, lambda e, x: x, pooled, self.rows
            )
            if self._weighs_rows(self.first):
                assert up is not None and down is not None
                statistics = replace(statistics, row_importance=share * self._importance(work, tap, up, down))
        up_used = self._quantize(self.first, work, own_up, up, statistics)
        del statistics
        statistics = None
        kept: dict[int, torch.Tensor] = {}

        def hidden(expert: int, x: torch.Tensor) -> torch.Tensor:
            states = self._hidden(expert, x, up_used[expert - start])
            room = (KEPT_ON_GPU if states.is_cuda else KEPT) - sum(other.nbytes for other in kept.values())
            if len(x) == len(tap.routed(expert)[0]) and states.nbytes <= room:
                kept[expert] = states
            return states

        if self._calibrated(self.down):
            statistics = self._statistics(
                work,
                self.down.shape[2],
                tap,
                original,
                hidden,
                lambda e, x: self._hidden(e, x, up[e - start]),  # type: ignore[index]
                None,
                0,
            )
            statistics = replace(statistics, row_importance=share.expand(-1, self.down.shape[1]))
        if own_down is None:  # later than it must be: what is read ahead has had more time
            own_down, down = self._weights(self.down, work)
        down_used = self._quantize(self.down, work, own_down, down, statistics)
        del statistics
        self._outputs(experts, tap, up_used, down_used, kept)
        if original is not None:
            assert up is not None and down is not None
            self._outputs(experts, original, up, down, {})

    # What an expert computes.

    def _linear(self, parameter: str, expert: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        states = x @ weight.T
        if module.has_bias:
            states += getattr(module, f"{parameter}_bias")[expert].float()
        return states

    def _hidden(self, expert: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What goes into down: x (M, H), gate and up (N, H) -> (M, I)."""
        return self._gated(self._linear(self.first.parameter, expert, x, weight))

    def _gated(self, states: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        return module._apply_gate(states) if module.has_gate else module.act_fn(states)

    def _outputs(
        self, experts: range, tap: ExpertsTap, up: torch.Tensor, down: torch.Tensor, kept: dict[int, torch.Tensor]
    ) -> None:
        """Adds what experts make of their tokens, in the order of the experts. `kept`: what goes into down of all of an
        expert's tokens, where it is known; taken out."""
        module: Any = self.module
        assert tap.outputs is not None
        for expert in experts:
            for rows, gate, x in self._rows(tap, tap.routed(expert)):
                hidden = kept.pop(expert, None)
                if hidden is None:
                    hidden = self._hidden(expert, x, up[expert - experts.start])
                states = self._linear(self.down.parameter, expert, hidden, down[expert - experts.start])
                if getattr(module, "has_post_expert_norm", False):
                    states = module.post_expert_norm(states)
                if self.observe is not None:
                    self.observe(self.down, expert, gate, states)
                tap.outputs.add(rows, states * gate)

    def _rows(
        self, tap: ExpertsTap, routed: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows, routing weights (n, 1), inputs (n, K)) of an expert's tokens, as the tap gives them, piece by piece;
        the last two on the device."""
        assert tap.inputs is not None
        rows, gate = routed
        for first in range(0, len(rows), ROWS):
            piece = rows[first : first + ROWS]
            x = tap.inputs.gather(piece).to(self.device)
            yield piece, gate[first : first + ROWS, None].to(self.device), x

    # Statistics.

    def _pooled(self, tap: ExpertsTap) -> torch.Tensor:
        """Sum over all tokens of x x^T of the module's inputs, (H, H) float32."""
        assert tap.inputs is not None and tap.weight is not None
        width = self.first.shape[2]
        total = torch.zeros(width, width, device=self.device)
        for first in range(0, tap.counted, ROWS):
            last = min(first + ROWS, tap.counted)
            x = tap.inputs.read(first, last).to(self.device)
            if self.gate_weighted:
                x = x * tap.weight[first:last].square().mean(1, keepdim=True).sqrt().to(self.device)
            add_squares(total, x)
        complete(total)
        return self.group.sum(total)

    def _gates(self, tap: ExpertsTap) -> torch.Tensor:
        experts = self.first.shape[0]
        if self.gate_weighted:
            return torch.ones(experts)
        sums = torch.tensor([float(tap.seen(expert)[1].square().sum()) for expert in range(experts)])
        return self.group.sum(sums) / self.counts.sum(0).clamp(min=1)

    def _statistics(
        self,
        work: Round,
        width: int,
        tap: ExpertsTap,
        original: ExpertsTap | None,
        transform: Callable[[int, torch.Tensor], torch.Tensor],
        transform_original: Callable[[int, torch.Tensor], torch.Tensor],
        pooled: torch.Tensor | None,
        pooled_tokens: int,
    ) -> StackStatistics:
        """Statistics of this process's experts. `transform` makes of an expert's inputs what its matrix is
        given; without `pooled` that is the sum over the chunk's tokens."""
        shares, rank = work.shares, self.group.rank
        hessian = drift = torch.empty(0)
        chunk_sum = torch.zeros(width, width, device=self.device) if pooled is None and work.divided else None
        for owner, experts in enumerate(shares):  # one share at a time: memory is for what this process owns
            sums, drifts = self._sums(experts, width, tap, original, transform, transform_original)
            if chunk_sum is not None:
                chunk_sum += sums.sum(0)
            if len(experts):
                self.group.sum_to(sums, owner)
                if original is not None:
                    self.group.sum_to(drifts, owner)
            if owner == rank:
                hessian, drift = sums, drifts
        if pooled is None:
            pooled = hessian.sum(0) if chunk_sum is None else self.group.sum(chunk_sum)
            of = work.experts if work.divided else shares[rank]
            pooled_tokens = int(self._tokens(of).sum())
        tokens = self._tokens(shares[rank]).to(self.device)
        return StackStatistics(tokens, hessian, pooled, pooled_tokens, None if original is None else drift)

    def _sums(
        self,
        experts: range,
        width: int,
        tap: ExpertsTap,
        original: ExpertsTap | None,
        transform: Callable[[int, torch.Tensor], torch.Tensor],
        transform_original: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hessians and drifts (experts, width, width) float32 over this process's tokens; no drifts without
        `original`."""
        hessian = torch.zeros(len(experts), width, width, device=self.device)
        drift = torch.zeros_like(hessian if original is not None else hessian[:0])
        for at, expert in enumerate(experts):
            for rows, gate, x in self._rows(tap, tap.seen(expert)):
                y = transform(expert, x)
                y_original = None
                if original is not None:
                    assert original.inputs is not None
                    y_original = transform_original(expert, original.inputs.gather(rows).to(self.device))
                if self.gate_weighted:
                    y = y * gate
                    y_original = None if y_original is None else y_original * gate
                add_squares(hessian[at], y)
                if y_original is not None:
                    add_products(drift[at], y_original - y, y)
            complete(hessian[at])
        return hessian, drift

    def _tokens(self, experts: range) -> torch.Tensor:
        """(experts,) int64: how many tokens each of them has, of all processes."""
        return self.counts[:, experts.start : experts.stop].sum(0)

    def _share(self, work: Round) -> torch.Tensor:
        """(this process's experts, 1) float32: what a squared error of 1 per token in an expert's output
        adds to the layer's, relative to the energy of the layer's own output. So an error counts for the more, the more
        tokens the expert has and the less else there is in the residual stream: the first layers' experts above all.
        """
        tokens = self._tokens(work.shares[self.group.rank]).to(self.device)
        return (tokens / (self.rows * self.energy)).float().unsqueeze(1)

    def _importance(self, work: Round, tap: ExpertsTap, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """How much an error in each output of gate and up matters to the expert's output: (this process's
        experts, N) float32, the mean over a sample of its tokens of (d hidden / d output)^2 x the squared norm of the
        column of down that takes it. Ones for an expert without tokens."""
        assert tap.inputs is not None
        importance = torch.zeros(len(work.experts), up.shape[1], device=self.device)
        totals: list[int] = self.counts.sum(0).tolist()
        before: list[int] = self.counts[: self.group.rank].sum(0).tolist()
        for at, expert in enumerate(work.experts):
            rows, gate = tap.seen(expert)
            if totals[expert] == 0:
                importance[at] = 1.0 / self.group.size
            if len(rows) == 0:
                continue
            step = -(-totals[expert] // SAMPLE)  # through the tokens of all processes, one after the other
            places = torch.arange(-before[expert] % step, len(rows), step)
            x = tap.inputs.gather(rows[places]).to(self.device)
            with torch.enable_grad():
                states = self._linear(self.first.parameter, expert, x, up[at]).requires_grad_()
                hidden = self._gated(states)
                (slope,) = torch.autograd.grad(hidden, states, down[at].norm(dim=0).expand_as(hidden))
            if self.gate_weighted:
                slope = slope * gate[places, None].to(self.device)
            importance[at] = slope.square().sum(0) / -(-totals[expert] // step)
        for owner, part in enumerate(work.shares):
            if len(part):
                self.group.sum_to(importance[work.places(part)], owner)
        return importance[work.places(work.shares[self.group.rank])]

    def _quantize(
        self,
        target: Target,
        work: Round,
        own: torch.Tensor,
        weights: torch.Tensor | None,
        statistics: StackStatistics | None,
    ) -> torch.Tensor:
        """Quantizes the matrices of a target, each process its `own`, and returns the weights to go on with, all of
        them, which are the original `weights` where the target is kept."""
        result, mine = self.results.get(target.name), work.shares[self.group.rank]
        if result is None or self.measure is not None:
            assert weights is not None
            if result is not None and self.measure is not None and statistics is not None and len(mine):
                self.measure(target, own, statistics, self.gates[mine.start : mine.stop])
            return weights
        treatment = result.treatment
        if statistics is None:
            pairs: Made = [
                treatment.of_matrix(weight.cpu(), f"{target.name}[{expert}]")
                for expert, weight in zip(mine, own, strict=True)
            ]
        else:
            pairs = treatment.of_stack(own, statistics, target.name) if len(mine) else []
            result.tokens += self._tokens(work.experts).tolist()
        used = torch.empty(len(work.experts), *target.shape[1:], device=self.device)
        treatment.restore(pairs, used[work.places(mine)])
        self._share_out(used, work)
        aside, threads = self.group.aside(), self.group.threads
        self.behind.do(lambda: result.take(aside.gather(result.part(pairs, threads))))
        return used
