"""Run-time layouts of packed records: made at first use, kept for as long as the record's memory lives.

Kernels read weights fastest in an order that storage does not have (`cpp/src/cpu/panels.h`). The layout is no part of
a module: it belongs to the memory of a packed tensor, so that modules save, load, copy and compile as if it did not
exist. The record's own pages are offered back to the system, which takes them where they are mapped from a file.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from .. import _C

ORDERS = ("plain", "halves", "interleaved")

# How products are computed on a CPU:
#   int8    activations rounded to int8, one scale per token and at most 128 columns; fastest
#   float   activations as they are, float32 sums; weights in the run-time layout too
#   stored  as float, straight from the record, decoding it at every call: no second copy of the weights
#   auto    int8 for bfloat16 and float16 activations, float for float32
COMPUTE = ("auto", "int8", "float", "stored")

# What activations may be, by the core's name for it.
DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

Layout = TypeVar("Layout")

_lock = threading.RLock()
# Address of a storage -> (offset, bytes, order, device) -> (version, layout). An entry goes when its storage does.
_layouts: dict[int, dict[tuple[int, int, str, str], tuple[int, object]]] = {}


def layout_of(packed: torch.Tensor, order: str) -> torch.Tensor:
    """The run-time layout of a packed record in CPU memory, (bytes,) uint8, aligned to 64 bytes.

    Args:
        packed: (nbytes,) uint8, contiguous.
        order: of the rows: "plain", or "halves" or "interleaved" for gate and up.

    Raises:
        QmoeError: E_SHAPE for an odd number of rows in a gated order; E_NO_KERNEL; what the record's parser refuses.
    """
    return cached(packed, order, "cpu", lambda: _make(packed, order))


def cached(packed: torch.Tensor, order: str, device: str, make: Callable[[], Layout]) -> Layout:
    """What `make` gives for a packed record on a device: kept, and made once, while the record's memory is there."""
    storage = packed.untyped_storage()
    place = (int(packed.storage_offset()), packed.numel(), order, device)
    # Tensors made in inference mode count no versions; they cannot be changed in place outside of it either.
    version = 0 if packed.is_inference() else packed._version
    with _lock:
        found = _layouts.get(storage._cdata, {}).get(place)
        if found is not None and found[0] == version:
            return found[1]  # type: ignore[return-value]
        layout = make()
        if storage._cdata not in _layouts:
            _layouts[storage._cdata] = {}
            weakref.finalize(storage, _layouts.pop, storage._cdata, None)
        _layouts[storage._cdata][place] = (version, layout)
        return layout


def forget(packed: torch.Tensor, device: str) -> None:
    """Drop what was kept of a record for a device."""
    with _lock:
        kept = _layouts.get(packed.untyped_storage()._cdata, {})
        for place in [place for place in kept if place[3] == device]:
            del kept[place]


def _make(packed: torch.Tensor, order: str) -> torch.Tensor:
    nbytes = _C.prepack_size(packed.data_ptr(), packed.numel(), order)
    # torch aligns allocations to 64 bytes today, but promises it nowhere.
    memory = torch.empty(nbytes + 63, dtype=torch.uint8)
    layout = memory[-memory.data_ptr() % 64 :][:nbytes]
    _C.prepack(packed.data_ptr(), packed.numel(), order, layout.data_ptr(), nbytes, torch.get_num_threads())
    return layout


def precision(compute: str, dtype: torch.dtype) -> str:
    """What `compute` means for activations of `dtype`: "int8", "float" or "stored"."""
    if compute != "auto":
        return compute
    return "float" if dtype == torch.float32 else "int8"
