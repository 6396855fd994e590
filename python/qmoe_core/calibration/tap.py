"""What stands in for an experts module while its layer runs."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import QmoeError
from .buffers import Budget, RowBuffer


class ExpertsTap:
    """Stands in for the forward of an experts module: records its inputs, or hands back outputs computed before.

    Attributes:
        inputs: (T, H) what the experts were given; index: (T, k) int64, weight: (T, k) float32, both on the device;
            outputs: (T, H).
        position: the row that the next call begins with; whoever runs the layer keeps it right.
        counted: how many leading rows statistics are taken of; those behind them only run along.
        mode: "record"; "replay" to hand back `outputs`; "skip" to return zeros and note nothing.
    """

    def __init__(self, name: str, rows: int, budget: Budget, spill: Path, counted: int, device: str) -> None:
        self.name, self.rows, self.position, self.counted = name, rows, 0, counted
        self.mode = "skip"
        self.inputs: RowBuffer | None = None
        self.outputs: RowBuffer | None = None
        self.index: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self._budget, self._spill, self._device = budget, spill, device
        self._sorted: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None

    def __call__(self, *arguments: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        hidden, index, weight = (*arguments, *named.values())
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.mode == "skip":
            return torch.zeros_like(hidden)
        if self.mode == "replay":
            assert self.outputs is not None
            rows = self.outputs.read(self.position, self.position + len(flat))
            return rows.to(hidden.device, hidden.dtype).clone().view_as(hidden)
        if self.inputs is None:
            self.make_inputs(flat.shape[1], index.shape[-1])
        assert self.inputs is not None and self.index is not None and self.weight is not None
        if len(flat) != len(index) or self.position + len(flat) > self.rows:
            raise QmoeError(
                "E_LAYOUT",
                "calibration expects experts to be called once per layer with all tokens",
                tensor=self.name,
                expected=tuple(index.shape),
                actual=tuple(hidden.shape),
            )
        rows_of = slice(self.position, self.position + len(flat))
        self.inputs.write(self.position, flat)
        self.index[rows_of].copy_(index)
        self.weight[rows_of].copy_(weight)
        return torch.zeros_like(hidden)

    def make_inputs(self, width: int, choices: int) -> None:
        """Room for inputs of `width` columns and `choices` experts per token, no token of which is routed yet."""
        self.inputs = self._buffer(width, ".inputs")
        self.index = torch.full((self.rows, choices), -1, dtype=torch.int64, device=self._device)
        self.weight = torch.zeros(self.rows, choices, device=self._device)

    def make_outputs(self) -> None:
        assert self.inputs is not None
        self.outputs = self._buffer(self.inputs.width, ".outputs")

    def _buffer(self, width: int, suffix: str) -> RowBuffer:
        return RowBuffer(self.rows, width, self._budget, self._spill.with_suffix(suffix), self._device)

    def routed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, weights): the tokens of one expert in ascending order, and their routing weights, on the device."""
        rows, weights, bounds = self._by_expert()
        places = slice(*bounds[expert : expert + 2]) if expert + 1 < len(bounds) else slice(0, 0)
        return rows[places], weights[places]

    def _by_expert(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Rows and weights of all choices, by expert and then by row, and where those of each expert begin."""
        assert self.index is not None and self.weight is not None
        if self._sorted is None:
            ids, order = self.index.reshape(-1).sort(stable=True)
            highest = int(ids[-1]) if len(ids) else -1
            experts = torch.arange(highest + 2, device=ids.device)
            bounds: list[int] = torch.searchsorted(ids.contiguous(), experts).tolist()
            self._sorted = order // self.index.shape[1], self.weight.reshape(-1)[order], bounds
        return self._sorted

    def seen(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`routed`, of the tokens that count for statistics."""
        rows, weights = self.routed(expert)
        if self.counted == self.rows:
            return rows, weights
        count = int(torch.searchsorted(rows, self.counted))
        return rows[:count], weights[:count]

    def counts(self, experts: int) -> torch.Tensor:
        """(experts,) int64 on the host: how many tokens that count each expert was given."""
        return torch.tensor([len(self.seen(expert)[0]) for expert in range(experts)])

    def close(self) -> None:
        for buffer in (self.inputs, self.outputs):
            if buffer is not None:
                buffer.close()
