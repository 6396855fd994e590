"""Quantized matrices to packed records, by the CPU's encoder or, ternary ones, by that of the CUDA device that holds
their trits. The bytes are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .. import _C
from ..errors import QmoeError
from ..formats import PackedTensor, TernaryMatrix
from .base import Matrix
from .feedback_cuda import on_gpu, usable

SCRATCH = 1 << 29  # bytes on the device that the matrices encoded at once take at most, unless one takes more
LEVELS = (torch.float32, torch.bfloat16)


def pack(matrices: Sequence[Matrix], threads: int = 0) -> PackedTensor:
    """As `PackedTensor.pack`, but ternary matrices are encoded on a CUDA device where all of their trits lie there
    (`TernaryMatrix.there`), libqmoe_cuda is, and there is memory for it: about a byte a weight, 512 MiB at most."""
    there = _stack_there(matrices)
    if there is not None:
        try:
            levels = np.stack([matrix.levels for matrix in matrices if isinstance(matrix, TernaryMatrix)])
            return encode_ternary(there, torch.from_numpy(levels), threads)
        except torch.OutOfMemoryError:
            pass
    return PackedTensor.pack(matrices, threads)


def encode_ternary(trits: torch.Tensor, levels: torch.Tensor, threads: int = 0) -> PackedTensor:
    """The record of ternary matrices whose trits lie on a CUDA device: the bytes that `PackedTensor.pack` makes.

    Args:
        trits: (E, N, K) int8 on a CUDA device, each -1, 0 or 1; bfloat16, float16 and float32 are taken as well.
        levels: (E, N, 2) [low, high] or (E, N, 1) [high], low being -high; float32 or bfloat16, finite bfloat16 values,
            anywhere.
        threads: of the host, for checksums; 0: all.

    Waits for the device. Takes about a byte a weight there, 512 MiB or what one matrix takes at most, and the record.

    Raises:
        QmoeError: `E_DTYPE`; `E_SHAPE` for empty matrices and levels that do not fit; `E_VALUE` for something that is
            no trit, or a level that is not a finite bfloat16; `E_LIMIT` for more matrices, rows or columns than a
            record has; `E_NO_KERNEL` without libqmoe_cuda or for trits elsewhere.
    """
    codes = _codes(trits)
    experts, rows, cols = codes.shape
    if levels.dtype not in LEVELS:
        raise QmoeError("E_DTYPE", "levels of ternary matrices", expected=[str(d) for d in LEVELS],
                        actual=str(levels.dtype))  # fmt: skip
    if levels.ndim != 3 or levels.shape[:2] != (experts, rows) or levels.shape[2] not in (1, 2):
        raise QmoeError("E_SHAPE", "levels of ternary matrices", expected=(experts, rows, "1 or 2"),
                        actual=tuple(levels.shape))  # fmt: skip
    with torch.cuda.device(codes.device):
        stream = torch.cuda.current_stream().cuda_stream
        counts = codes.new_empty(29, dtype=torch.int64)
        _C.cuda_ternary_census(codes.data_ptr(), experts * rows, cols, counts.data_ptr(), stream)
        host_levels = levels.detach().float().contiguous().numpy(force=True)
        encoder = _C.CudaTernaryEncoder(host_levels, cols, counts.cpu().numpy().view(np.uint64))
        pieces, offsets = _pieces(encoder, codes, stream)
        record = torch.empty(encoder.head + sum(len(piece) for piece in pieces), dtype=torch.uint8)
        at = encoder.head
        for piece in pieces:
            record[at : at + len(piece)] = piece
            at += len(piece)
    data = record.numpy()
    encoder.finish(offsets, data, threads)
    return PackedTensor(data)


def _pieces(encoder: _C.CudaTernaryEncoder, codes: torch.Tensor, stream: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """What the record has behind its head, in pieces, uint8 on the device, without what the host adds; and the offsets
    (E, blocks + 1) uint32 on the host."""
    experts = len(codes)
    tables = torch.from_numpy(encoder.tables).to(codes.device)
    at_once = min(experts, max(1, SCRATCH // encoder.scratch))
    scratch = codes.new_empty(at_once * encoder.scratch, dtype=torch.uint8)
    room = scratch.data_ptr(), scratch.numel()
    pieces, offsets = [], np.empty((experts, encoder.offsets), dtype=np.uint32)
    for first in range(0, experts, at_once):
        some = codes[first : first + at_once]
        # Offsets, and behind them misfits.
        found = codes.new_empty(len(some) * (encoder.offsets + 1), dtype=torch.int32)
        misfits = found[len(some) * encoder.offsets :]
        own = found.data_ptr(), misfits.data_ptr()
        encoder.code(some.data_ptr(), len(some), tables.data_ptr(), *own, *room, stream)
        on_host = found.cpu().numpy().view(np.uint32)
        own_offsets = offsets[first : first + len(some)]
        own_offsets[:] = on_host[: own_offsets.size].reshape(own_offsets.shape)
        first_words, size = encoder.places(own_offsets, on_host[own_offsets.size :])
        places = torch.from_numpy(first_words.view(np.int64)).to(codes.device)
        pieces.append(codes.new_zeros(size, dtype=torch.uint8))
        encoder.words(len(some), own[0], *room, places.data_ptr(), pieces[-1].data_ptr(), stream)
    return pieces, offsets


def _codes(trits: torch.Tensor) -> torch.Tensor:
    """(E, N, K) int8, contiguous."""
    on_gpu(trits)
    if trits.ndim != 3 or 0 in trits.shape:
        raise QmoeError("E_SHAPE", "trits are a stack (E, N, K)", actual=tuple(trits.shape))
    if trits.dtype == torch.int8:
        return trits.contiguous()
    if trits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise QmoeError("E_DTYPE", "trits", expected="int8, bfloat16, float16 or float32", actual=str(trits.dtype))
    codes = trits.to(torch.int8, memory_format=torch.contiguous_format)
    if not torch.equal(codes.to(trits.dtype), trits):
        raise QmoeError("E_VALUE", "ternary: a trit is not -1, 0 or 1")
    return codes


def _stack_there(matrices: Sequence[Matrix]) -> torch.Tensor | None:
    """The trits (E, N, K) of matrices of one format where all of them lie on one device that encodes, or None."""
    there: list[torch.Tensor] = []
    for matrix in matrices:
        if not isinstance(matrix, TernaryMatrix) or matrix.there is None or matrix.format != matrices[0].format:
            return None
        there.append(matrix.there)
    if not there or not usable(there[0]):
        return None
    first = there[0]
    if any(t.device != first.device or t.shape != first.shape or not t.is_contiguous() for t in there):
        return None
    size, base = first.numel(), first.untyped_storage().data_ptr()
    places = range(first.data_ptr(), first.data_ptr() + len(there) * size, size)
    if all(t.untyped_storage().data_ptr() == base and t.data_ptr() == at for t, at in zip(there, places, strict=True)):
        return first.as_strided((len(there), *first.shape), (size, *first.stride()))
    return torch.stack(there)
