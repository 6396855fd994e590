"""The formats as Python sees them: names, parameters, one quantized matrix, and packed stacks of them.

A format says how a weight matrix (N, K) = (out_features, in_features) is stored, and nothing about how it was chosen;
the bytes are written and read by the C++ core alone (cpp/FORMAT.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C
from .errors import QmoeError
from .store import crc32c, crc32c_joined

INT_BITS = (2, 3, 4, 8)
INT_GROUPS = (0, 16, 32, 64, 128)
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class IntFormat:
    """Uniform codes: weight = scale * (code - zero).

    Args:
        bits: 2, 3, 4 or 8.
        group: columns that share a scale: 16, 32, 64, 128, or 0 for the whole row.
        zero_point: store a zero point per group; otherwise zero = 2**(bits-1).
        scale_dtype: "float16", "bfloat16" or "float32".
        half_step: zeros lie halfway between two codes: zero = stored + 1/2, or 2**(bits-1) - 1/2 where none are stored,
            which makes the levels +-1/2, +-3/2, ... scales: as many above zero as below, none at zero. Made for 2 bits
            and methods that choose scales by error; "rtn", which spans the largest weight, mostly loses by it.

    Raises:
        QmoeError: E_VALUE for anything else.
    """

    bits: int
    group: int = 128
    zero_point: bool = True
    scale_dtype: str = "float16"
    half_step: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, INT_BITS),
            ("group", self.group, INT_GROUPS),
            ("scale_dtype", self.scale_dtype, SCALE_DTYPES),
        ):
            if value not in allowed:
                raise QmoeError("E_VALUE", f"int format: {name} is not supported", expected=allowed, actual=value)

    @property
    def zero_offset(self) -> float:
        """What is added to a stored zero point, or to 2**(bits-1) where none are stored: 0, 1/2 or -1/2."""
        return 0.0 if not self.half_step else 0.5 if self.zero_point else -0.5

    @property
    def name(self) -> str:
        """For example "int4-g128", "int8-row", "int3-g64-sym", "int2-g16-half", "int2-g64-sym-half"."""
        group = f"g{self.group}" if self.group else "row"
        return f"int{self.bits}-{group}{'' if self.zero_point else '-sym'}{'-half' if self.half_step else ''}"


@dataclass(frozen=True)
class TernaryFormat:
    """Every weight is low, 0 or high of its row, entropy-coded without loss.

    Args:
        levels: "pair" stores low and high per row, "symmetric" only high (low = -high); bfloat16 each.
    """

    levels: str = "pair"

    def __post_init__(self) -> None:
        if self.levels not in ("pair", "symmetric"):
            raise QmoeError(
                "E_VALUE", "ternary format: unknown levels", expected=("pair", "symmetric"), actual=self.levels
            )

    @property
    def name(self) -> str:
        """ "ternary" or "ternary-sym"."""
        return "ternary" if self.levels == "pair" else "ternary-sym"


Format = IntFormat | TernaryFormat


def parse_format(text: str, **options: Any) -> Format:
    """Read a format from its family name ("int4", "ternary") with options, or from a full name ("int4-g128-sym",
    "int2-g64-half").

    Options given as keywords are the fields of the format and win over the name.

    Raises:
        QmoeError: E_UNKNOWN for an unknown name, E_VALUE for a bad parameter.
    """
    family, *parts = text.split("-")
    try:
        if family == "ternary":
            fields: dict[str, Any] = {"levels": "symmetric"} if parts == ["sym"] else {}
            if parts not in ([], ["sym"]):
                raise ValueError
            return TernaryFormat(**{**fields, **options})
        if not family.startswith("int"):
            raise ValueError
        fields = {"bits": int(family[3:])}
        for part in parts:
            if part == "row":
                fields["group"] = 0
            elif part == "sym":
                fields["zero_point"] = False
            elif part == "half":
                fields["half_step"] = True
            elif part.startswith("g"):
                fields["group"] = int(part[1:])
            else:
                raise ValueError
        return IntFormat(**{**fields, **options})
    except QmoeError:
        raise
    except (ValueError, TypeError) as error:
        known = "int2, int3, int4, int8 (with -g16, -g32, -g64, -g128, -row, -sym, -half) and ternary (with -sym)"
        raise QmoeError("E_UNKNOWN", f"unknown format {text!r} {options or ''}; known are {known}") from error


@dataclass
class IntMatrix:
    """One matrix in `int`: codes uint8 (N, K), scales float32 (N, G) representable in scale_dtype, zeros uint8 (N, G)
    as stored (a half-step format adds its half where they are used), or None."""

    format: IntFormat
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> NDArray[np.float32]:
        """float32 (N, K), computed in NumPy independently of the core."""
        columns = self.codes.shape[1]
        width = self.format.group or columns
        spread = np.arange(columns) // width
        middle = np.float32(2 ** (self.format.bits - 1))
        stored = middle if self.zeros is None else self.zeros.astype(np.float32)[:, spread]
        zero = stored + np.float32(self.format.zero_offset)
        return self.scales[:, spread] * (self.codes.astype(np.float32) - zero)

    def _fields(self) -> dict[str, Any]:
        f = self.format
        if (self.zeros is not None) != f.zero_point:
            raise QmoeError("E_VALUE", "int: zero points and the format contradict each other", expected=f.zero_point)
        return {
            "format": "int",
            "bits": f.bits,
            "group": f.group,
            "scale_dtype": f.scale_dtype,
            "half_step": f.half_step,
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
        }


@dataclass
class TernaryMatrix:
    """One matrix in `ternary`: trits int8 (N, K) in {-1, 0, 1}; levels float32, (N, 2) [low, high] or (N, 1)
    [high] when symmetric.

    `there`: the same trits on the CUDA device that made them, a torch tensor, where `quantize.packing` encodes them; or
    None. Copies and other processes do without.
    """

    format: TernaryFormat
    trits: NDArray[np.int8]
    levels: NDArray[np.float32]
    there: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "there": None}

    @property
    def shape(self) -> tuple[int, int]:
        return self.trits.shape[0], self.trits.shape[1]

    def dequantize(self) -> NDArray[np.float32]:
        """float32 (N, K), computed in NumPy independently of the core."""
        high = self.levels[:, -1:]
        low = -high if self.levels.shape[1] == 1 else self.levels[:, :1]
        zero = np.zeros_like(high)
        return np.where(self.trits > 0, high, np.where(self.trits < 0, low, zero)).astype(np.float32)

    def _fields(self) -> dict[str, Any]:
        wanted = 1 if self.format.levels == "symmetric" else 2
        if self.levels.ndim != 2 or self.levels.shape[1] != wanted:
            raise QmoeError("E_SHAPE", "ternary: levels per row", expected=wanted, actual=self.levels.shape)
        return {"format": "ternary", "trits": self.trits, "levels": self.levels}


Matrix = IntMatrix | TernaryMatrix


@dataclass(frozen=True)
class PackedTensor:
    """A packed record: E matrices of one shape (N, K) as uint8 (bytes,). Validated on construction, CRCs included.

    Raises:
        QmoeError: with a code of the refusal table and the offset, if the bytes are not a sound record.
    """

    data: NDArray[np.uint8]
    info: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", _C.inspect_record(self.data))

    @classmethod
    def pack(cls, matrices: Sequence[Matrix], threads: int = 0) -> PackedTensor:
        """Encode matrices of equal shape; their formats may differ. The bytes do not depend on `threads` (0: all)."""
        if not matrices:
            raise QmoeError("E_SHAPE", "nothing to pack")
        rows, cols = matrices[0].shape
        for index, matrix in enumerate(matrices):
            if matrix.shape != (rows, cols):
                raise QmoeError(
                    "E_SHAPE", f"matrix {index} differs in shape", expected=(rows, cols), actual=matrix.shape
                )
        return cls(_C.build_record(rows, cols, [matrix._fields() for matrix in matrices], threads))

    @property
    def experts(self) -> int:
        return int(self.info["experts"])

    @property
    def rows(self) -> int:
        return int(self.info["rows"])

    @property
    def cols(self) -> int:
        return int(self.info["cols"])

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the record, metadata and padding included, times 8 over the number of weights."""
        return self.nbytes * 8 / (self.experts * self.rows * self.cols)

    def decode(self, expert: int) -> NDArray[np.float32]:
        """One expert as float32 (N, K), by the scalar reference decoder."""
        decoded: NDArray[np.float32] = _C.decode_record(self.data, expert)
        return decoded

    def verify(self) -> None:
        """Decode everything strictly; refuses whatever an encoder would not have written (E_CORRUPT, E_CHECKSUM)."""
        _C.inspect_record(self.data, verify=True)

    def slice_experts(self, first: int, count: int) -> PackedTensor:
        """Experts [first, first + count) without decoding, as expert parallelism wants them."""
        return PackedTensor(_C.slice_experts(self.data, first, count))


@dataclass(frozen=True)
class RecordPart:
    """A packed record that is to become part of a longer one. Attributes: data: uint8 (bytes,), sound. crc32c: of its
    matrices' bytes, which are all behind its head."""

    data: NDArray[np.uint8]
    crc32c: int

    @classmethod
    def pack(cls, matrices: Sequence[Matrix], threads: int = 0) -> RecordPart:
        """As `PackedTensor.pack`."""
        return cls.of(PackedTensor.pack(matrices, threads))

    @classmethod
    def of(cls, packed: PackedTensor) -> RecordPart:
        return cls(packed.data, crc32c(packed.data[packed.info["entries"][0]["offset"] :]))


@dataclass(frozen=True)
class RecordPieces:
    """A packed record as pieces of bytes that come one after the other. Attributes: pieces: uint8 (bytes,) each.
    crc32c: of all."""

    pieces: list[NDArray[np.uint8]]
    crc32c: int

    @classmethod
    def join(cls, parts: Sequence[RecordPart]) -> RecordPieces:
        """The record of the matrices of all parts, in order; none of them is copied. Of `int` matrices it is the one
        that `PackedTensor.pack` makes of all of them at once. Raises `E_SHAPE`."""
        head, starts = _C.join_records([part.data for part in parts])
        pieces, crc = [head], crc32c(head)
        for part, start in zip(parts, starts, strict=True):
            pieces.append(part.data[start:])
            crc = crc32c_joined(crc, part.crc32c, pieces[-1].nbytes)
        return cls(pieces, crc)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)
