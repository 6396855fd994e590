"""What a packed buffer must hold, and the check that it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import _C
from ..errors import QmoeError
from .cuda import Stack, stack_of
from .layouts import cached, forget

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """One stack of matrices as config.json describes it: E experts (1 for a linear layer), N rows, K columns, stored
    size."""

    experts: int
    rows: int
    cols: int
    nbytes: int
    format: str = ""

    @classmethod
    def parse(cls, entry: Any, tensor: str) -> PackedShape:
        """From `{"shape": [E, N, K], "nbytes": n, "format": name}`. Raises QmoeError E_SHAPE for anything else."""
        shape = entry.get("shape") if isinstance(entry, Mapping) else None
        nbytes = entry.get("nbytes") if isinstance(entry, Mapping) else None
        numbers: list[Any] = [*shape, nbytes] if isinstance(shape, (list, tuple)) and len(shape) == 3 else [nbytes]
        # bool is an int to isinstance, and JSON's true is no size.
        if len(numbers) != 4 or not all(type(n) is int and 0 < n < 2**62 for n in numbers):
            raise QmoeError(
                "E_SHAPE",
                "quantization_config: a packed tensor needs shape [E, N, K] and nbytes",
                tensor=tensor,
                actual=entry,
            )
        experts, rows, cols, size = numbers
        return cls(experts, rows, cols, size, str(entry.get("format", "")))

    def buffer(self) -> torch.Tensor:
        """Uninitialised bytes of the right size, on torch's current default device."""
        return torch.empty(self.nbytes, dtype=torch.uint8)

    def check(self, packed: torch.Tensor, tensor: str) -> None:
        """Refuse bytes that are not this record: size, structure, shape, and the CRC32C of the header and of every
        matrix.

        Raises:
            QmoeError: naming `tensor`; E_DTYPE, E_SHAPE, or what the record's parser refuses.
        """
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            raise QmoeError(
                "E_DTYPE", "a packed tensor is 1-D uint8", tensor=tensor, actual=(packed.dtype, packed.dim())
            )
        if packed.numel() != self.nbytes:
            raise QmoeError("E_SHAPE", "packed size", tensor=tensor, expected=self.nbytes, actual=packed.numel())
        data = packed.contiguous().numpy(force=True)
        try:
            info = _C.inspect_record(data)
        except QmoeError as error:
            raise error.locate(tensor=tensor) from None
        shape = (info["experts"], info["rows"], info["cols"])
        if shape != (self.experts, self.rows, self.cols):
            expected = (self.experts, self.rows, self.cols)
            raise QmoeError("E_SHAPE", "packed shape (E, N, K)", tensor=tensor, expected=expected, actual=shape)


class PackedModule(nn.Module):
    """A module with packed records as buffers `<tensor>_qmoe`, one for each of `shapes`.

    On a CUDA device a record's run-time layout is all that products need. So the records themselves stay in CPU memory
    (often pages of a file) wherever the module is moved to, and only layouts go to the device: weights are there once.
    """

    shapes: dict[str, PackedShape]
    _place = _CPU

    def row_order(self, tensor: str) -> str:
        """The order of rows that products of `tensor` want, see `layouts.ORDERS`."""
        return "plain"

    def settle(self) -> None:
        """Replace records in CUDA memory, where a loader may have put them, by layouts there and copies in CPU memory.

        Not while torch.compile traces: then a record stays where it is, beside its layout.
        """
        if torch.compiler.is_compiling():
            return
        for tensor in self.shapes:
            packed = self._buffers.get(f"{tensor}_qmoe")
            if packed is not None and packed.is_cuda:
                self._place, order, host = packed.device, self.row_order(tensor), packed.cpu()
                cached(host, order, str(packed.device), lambda p=packed, o=order: Stack(p, o, p.device))  # type: ignore[misc]
                setattr(self, f"{tensor}_qmoe", host)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        target = fn(torch.empty(0, dtype=torch.uint8, device=self._place)).device
        names = [f"{tensor}_qmoe" for tensor in self.shapes] if target.type == "cuda" or self._place != _CPU else []
        buffers = {name: self._buffers.get(name) for name in names}
        kept = {name: packed for name, packed in buffers.items() if packed is not None and packed.device == _CPU}
        for name in kept:
            self._buffers[name] = None  # passed by
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        for name, packed in kept.items():
            if self._place not in (_CPU, target):
                forget(packed, str(self._place))
            if target.type == "cuda":
                stack_of(packed, self.row_order(name.removesuffix("_qmoe")), target)
        if kept:
            self._place = target
        return self


def placeholder(*shape: int) -> torch.Tensor:
    """What a packed module shows where model code expects a dense weight: its shape, but no memory and no values.

    On the meta device, so that computing with it fails. int8, because model code that casts activations to the weight's
    dtype (T5, Switch) leaves them alone then. Marked as initialized, so that transformers' `_init_weights` passes by.
    """
    tensor = torch.empty(shape, dtype=torch.int8, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor
