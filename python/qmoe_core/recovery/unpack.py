"""Packed records back to codes and scales, trits and levels.

The core has validated every record before it comes here, and what is read here is compared with what the core decodes,
so this is no second parser of untrusted bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QmoeError
from ..formats import IntFormat, IntMatrix, Matrix, PackedTensor, TernaryFormat, TernaryMatrix

_BLOCK = 32  # codes


def unpack(packed: PackedTensor, tensor: str = "") -> list[Matrix]:
    """All matrices of a record.

    Raises:
        QmoeError: E_CORRUPT, naming `tensor`, where a matrix read here is not exactly what the core decodes.
    """
    matrices: list[Matrix] = []
    for expert, entry in enumerate(packed.info["entries"]):
        spec = packed.info["specs"][entry["spec"]]
        decoded = packed.decode(expert)
        if spec["format"] == "int":
            data = packed.data[entry["offset"] : entry["offset"] + entry["bytes"]]
            matrix: Matrix = _int(data, spec, packed.rows, packed.cols)
        else:
            matrix = _ternary(decoded, TernaryFormat(spec["levels"]))
        if not np.array_equal(matrix.dequantize(), decoded):
            raise QmoeError("E_CORRUPT", f"matrix {expert} does not read as it decodes", tensor=tensor)
        matrices.append(matrix)
    return matrices


def _int(data: NDArray[np.uint8], spec: dict[str, Any], rows: int, cols: int) -> IntMatrix:
    """FORMAT.md, section 3."""
    names = set(IntFormat.__dataclass_fields__)
    format = IntFormat(**{name: value for name, value in spec.items() if name in names})
    bits = format.bits
    blocks = -(-cols // _BLOCK)
    groups = -(-cols // (format.group or cols))
    size = rows * blocks * 4 * bits
    planes = data[:size].reshape(rows, blocks, 4 * bits)
    codes = _codes(planes, bits).reshape(rows, blocks * _BLOCK)[:, :cols]
    width = 4 if format.scale_dtype == "float32" else 2
    raw = data[size : size + rows * groups * width]
    scales = _floats(raw, format.scale_dtype).reshape(rows, groups)
    zeros = None
    if format.zero_point:
        line = -(-groups * bits // 8)
        start = size + rows * groups * width
        packed = data[start : start + rows * line].reshape(rows, line)
        stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : groups * bits].reshape(rows, groups, bits)
        zeros = (stream.astype(np.uint16) << np.arange(bits, dtype=np.uint16)).sum(-1).astype(np.uint8)
    return IntMatrix(format, np.ascontiguousarray(codes), scales, zeros)


def _codes(planes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(..., 4 * bits) bytes of blocks -> (..., 32) codes."""
    if bits == 8:
        return planes
    if bits == 4:
        return np.concatenate([planes & 15, planes >> 4], axis=-1)
    low = planes[..., :8]
    codes = np.concatenate([(low >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    if bits == 3:
        codes = codes | np.unpackbits(planes[..., 8:12], axis=-1, bitorder="little") << 2
    return codes


def _floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)


def _ternary(decoded: NDArray[np.float32], format: TernaryFormat) -> TernaryMatrix:
    """Levels are what the rows hold besides zero: a level that no weight of its row has is of no account."""
    high, low = decoded.max(axis=1), decoded.min(axis=1)
    if format.levels == "symmetric":
        high = np.abs(decoded).max(axis=1)
        # The sign of a symmetric level only says which trit is which.
        return TernaryMatrix(format, np.sign(decoded).astype(np.int8), high[:, None])
    # Both levels of one sign: the other one is the value nearest to zero.
    magnitude = np.where(decoded == 0, np.inf, np.abs(decoded)).min(axis=1)
    low = np.where(low >= 0, np.where(magnitude < high, magnitude, 0), low)
    high = np.where(high <= 0, np.where(magnitude < -low, -magnitude, 0), high)
    trits = (decoded == high[:, None]).astype(np.int8) - ((decoded == low[:, None]) & (decoded != high[:, None]))
    trits[decoded == 0] = 0
    # An absent level is stored as the other one's mirror image, which keeps the patterns of levels alike.
    high, low = np.where(high == 0, -low, high), np.where(low == 0, -high, low)
    return TernaryMatrix(format, trits.astype(np.int8), np.stack([low, high], axis=1).astype(np.float32))
