"""The file that masks are kept in: safetensors, one uint8 tensor per mask.

    <tensor name>    uint8, the mask's bytes (`coding.py`)
    __metadata__     "format": "qmoe-masks", "version": "1",
                     "masks": JSON {name: {"shape": [E, N, K] or [N, K], "pattern": "2:4", "coding": "digits" or "bits",
                              "transposed": whether the parameter itself is (K, N), "crc32c": of the bytes}}

Beside a model it is called masks.qmoe: engines load every *.safetensors there. The header is parsed by the core's
strict safetensors parser. Files are whole or absent (`store.write_atomic`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _C
from ..errors import QmoeError
from ..store import canonical_json, crc32c, io_errors, write_atomic
from .coding import Digits, decode, digits_of, encode, encoded_size
from .patterns import Pattern

FORMAT, VERSION = "qmoe-masks", "1"


@dataclass(frozen=True)
class MaskInfo:
    """What a file says of one mask: its shape, (N, K) or (E, N, K), and whether the parameter that it is for has the
    last two dimensions the other way around."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    coding: str
    transposed: bool
    crc32c: int

    @property
    def digits(self) -> Digits | None:
        return digits_of(self.pattern) if self.coding == "digits" else None


@dataclass(frozen=True)
class EncodedMask:
    """A mask as it is in a file."""

    info: MaskInfo
    data: np.ndarray  # uint8

    @classmethod
    def of(cls, name: str, mask: torch.Tensor, pattern: Pattern, transposed: bool = False) -> EncodedMask:
        """By digits where the pattern has them and the mask fits it, else by bits."""
        whole = mask.detach().cpu().contiguous()
        matrices = whole.view(-1, *whole.shape[-2:])
        return cls.of_matrices(name, lambda: iter(matrices), tuple(mask.shape), pattern, transposed)

    @classmethod
    def of_matrices(
        cls,
        name: str,
        matrices: Callable[[], Iterator[torch.Tensor]],
        shape: tuple[int, ...],
        pattern: Pattern,
        transposed: bool = False,
    ) -> EncodedMask:
        """The same of bool matrices (N, K) that follow each other in a mask of `shape`; memory holds one of them at a
        time. `matrices` is called twice at most."""
        digits = digits_of(pattern)
        if digits is not None and not all(pattern.fits(matrix) for matrix in matrices()):
            digits = None
        data = encode((matrix.contiguous().view(-1).numpy() for matrix in matrices()), digits)
        coding = "bits" if digits is None else "digits"
        return cls(MaskInfo(name, shape, pattern, coding, transposed, crc32c(data)), data)


def mask_description(info: MaskInfo) -> dict[str, Any]:
    """What the file says of a mask, but for its name: plain JSON types."""
    return {
        "shape": list(info.shape), "pattern": str(info.pattern), "coding": info.coding, "transposed": info.transposed,
        "crc32c": info.crc32c,
    }  # fmt: skip


def mask_info(name: str, text: dict[str, Any]) -> MaskInfo:
    """The inverse of `mask_description`. Raises `E_CORRUPT`, or KeyError and TypeError where entries are absent."""
    shape, crc = tuple(text["shape"]), text["crc32c"]
    sound = len(shape) in (2, 3) and all(type(size) is int and 0 < size < 1 << 40 for size in shape)
    if not sound or type(crc) is not int or type(text["transposed"]) is not bool:
        raise QmoeError("E_CORRUPT", "a mask's description is wrong", tensor=name, actual=str(text)[:200])
    try:
        info = MaskInfo(name, shape, Pattern.parse(str(text["pattern"])), text["coding"], text["transposed"], crc)
    except QmoeError as error:
        raise QmoeError("E_CORRUPT", f"a mask's pattern is wrong: {error}", tensor=name) from error
    digits = info.coding == "digits"
    if info.coding not in ("digits", "bits") or (digits and (info.digits is None or shape[-1] % info.digits.pattern.m)):
        raise QmoeError("E_CORRUPT", "a mask's coding does not go with its pattern", tensor=name, actual=info.coding)
    return info


def write_masks(path: Path, infos: Iterable[MaskInfo], data: Iterable[np.ndarray]) -> int:
    """Writes a file, holding one mask's bytes at a time. Returns its size.

    Raises:
        QmoeError: `E_NO_SPACE`, `E_IO`, `E_SHAPE` (bytes that do not belong to the mask).
    """
    known = list(infos)
    texts = {info.name: mask_description(info) for info in known}
    metadata = {"format": FORMAT, "version": VERSION, "masks": canonical_json(texts).decode()}
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for info in known:
        size = encoded_size(prod(info.shape), info.digits)
        header[info.name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8, b" ")

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for info, bytes_of in zip(known, data, strict=True):
            size = encoded_size(prod(info.shape), info.digits)
            if bytes_of.nbytes != size:
                raise QmoeError("E_SHAPE", "a mask has the wrong size", tensor=info.name, expected=size,
                                actual=bytes_of.nbytes)  # fmt: skip
            yield np.ascontiguousarray(bytes_of).data

    return write_atomic(path, chunks())


class MaskFile:
    """A file of masks, open for reading one after another, or single matrices of them. Use as a context manager.

    Attributes:
        path: of the file. infos: name -> `MaskInfo`, in the order of the file.

    Example:
        >>> import tempfile, torch
        >>> from qmoe_core.sparsify import MaskFile, Masks
        >>> path = tempfile.mkdtemp() + "/masks.safetensors"
        >>> Masks({"experts": torch.ones(8, 4, 4, dtype=torch.bool).tril()}).save(path)
        >>> with MaskFile(path) as file:
        ...     file.read("experts", 3).sum()
        tensor(10)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `E_MISSING`, `E_IO`, `E_CORRUPT`, `E_VERSION`, `E_SHAPE`, or what the safetensors parser refuses
        (`E_TRUNCATED`, `E_OFFSET`, ...)."""
        self.path = Path(path)
        if not self.path.exists():
            raise QmoeError("E_MISSING", "no such file", file=path)
        self._file: Any = _C.SafetensorsFile(self.path)
        try:
            self.infos = self._read_infos()
        except BaseException:
            self._file.close()
            raise

    def _read_infos(self) -> dict[str, MaskInfo]:
        metadata = dict(self._file.metadata)
        if metadata.get("format") != FORMAT:
            raise QmoeError("E_CORRUPT", "these are not masks", file=self.path, expected=FORMAT,
                            actual=metadata.get("format"))  # fmt: skip
        if metadata.get("version") != VERSION:
            raise QmoeError("E_VERSION", "masks of another version", file=self.path, expected=VERSION,
                            actual=metadata.get("version"))  # fmt: skip
        try:
            masks = json.loads(metadata["masks"])
            infos = {name: self._info(name, dict(masks[name])) for name in self._file.tensors}
        except QmoeError as error:
            raise error.locate(file=self.path) from None
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise QmoeError(
                "E_CORRUPT", f"the metadata does not describe every mask: {error!r}", file=self.path
            ) from error
        if len(masks) != len(infos):
            raise QmoeError("E_MISSING", "the metadata describes masks that are not here", file=self.path,
                            tensor=min(set(masks) - set(infos)))  # fmt: skip
        return infos

    def _info(self, name: str, text: dict[str, Any]) -> MaskInfo:
        info = mask_info(name, text)
        dtype, _, begin, end = self._file.tensors[name]
        size = encoded_size(prod(info.shape), info.digits)
        if dtype != "U8" or end - begin != size:
            raise QmoeError(
                "E_SHAPE",
                "a mask has another size than its shape implies",
                tensor=name,
                expected=size,
                actual=end - begin,
            )
        return info

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def data(self, name: str) -> np.ndarray:
        """A mask's bytes as uint8. Raises `E_MISSING`, `E_CHECKSUM`, `E_IO`."""
        info = self._known(name)
        data: np.ndarray = self._file.read(name)
        found = crc32c(data)
        if found != info.crc32c:
            raise QmoeError("E_CHECKSUM", "a mask is damaged", file=self.path, tensor=name, expected=info.crc32c,
                            actual=found)  # fmt: skip
        return data

    def _known(self, name: str) -> MaskInfo:
        if name not in self.infos:
            raise QmoeError("E_MISSING", "the file has no such mask", file=self.path, tensor=name)
        return self.infos[name]

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A mask (N, K) or (E, N, K) bool, or matrix `index` of a stack (N, K). One matrix is read alone, so the
        checksum of the whole is not checked.

        Raises:
            QmoeError: `E_MISSING`, `E_VALUE` (no such matrix), `E_CHECKSUM`, `E_CORRUPT`, `E_IO`.
        """
        info = self._known(name)
        try:
            if index is None:
                return torch.from_numpy(decode(self.data(name), prod(info.shape), info.digits)).view(info.shape)
            if len(info.shape) != 3 or not 0 <= index < info.shape[0]:
                raise QmoeError("E_VALUE", "no such matrix in the mask", expected=info.shape, actual=index)
            with io_errors(self.path):
                return self._matrix(info, index)
        except QmoeError as error:
            raise error.locate(file=self.path, tensor=name) from None

    def _matrix(self, info: MaskInfo, index: int) -> torch.Tensor:
        count, digits = info.shape[1] * info.shape[2], info.digits
        per_byte = 8 if digits is None else digits.weights
        first = index * count // per_byte
        last = -(-(index + 1) * count // per_byte)
        data = self._file.read_range(info.name, first, last - first)
        # The last byte may also hold the beginning of the next matrix, so what is behind the end is not looked at.
        flat = np.unpackbits(data, bitorder="little").view(np.bool_) if digits is None else digits.decode(
            data, data.size * per_byte)  # fmt: skip
        start = index * count - first * per_byte
        return torch.from_numpy(flat[start : start + count].copy()).view(info.shape[1:])
