"""Reading the checkpoint to be compressed: a Hugging Face directory with safetensors files, untrusted.

The C++ core's `SafetensorsFile` parses and validates every header; this module only joins the shards of one model and
reads byte ranges that the parser has checked. Pickle files (.bin, .pt, .pkl, ...) can run code when they are opened, so
they never are: there is no flag for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _C
from .errors import QmoeError
from .store import canonical_json, crc32c, crc32c_joined, io_errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Weights of other frameworks and code: neither is part of the compressed model.
_NOT_COPIED = (
    *PICKLES,
    ".safetensors",
    ".safetensors.index.json",
    ".bin.index.json",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".py",
)
# config.json and the index are written anew; a model card would describe other files than the ones beside it.
# What pruning wrote beside its checkpoint does not describe what is made of that.
MASKS, PRUNE_JSON, EXPERTS_JSON = "masks.qmoe", "prune.json", "pruned_experts.json"
_REPLACED = ("config.json", "qmoe.json", "README.md", MASKS, PRUNE_JSON, EXPERTS_JSON)
_SAMPLE_BYTES = 4096

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the source: dtype as safetensors spells it, `begin`/`end` in bytes from the start of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `E_CORRUPT`, `E_IO`."""
    try:
        with io_errors(path):
            value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QmoeError("E_CORRUPT", f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise QmoeError("E_CORRUPT", "the JSON is not an object", file=path)
    return value


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the shards in order, and the index's tensor -> shard map (empty for a single file)."""
    if (directory / INDEX).exists():
        weight_map = load_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise QmoeError("E_CORRUPT", "the index has no weight_map of strings", file=directory / INDEX)
        for name in dict.fromkeys(weight_map.values()):
            if name.endswith(PICKLES):
                raise QmoeError("E_UNSAFE_SOURCE", "the index names a pickle file", file=directory / INDEX, actual=name)
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise QmoeError(
                    "E_NAME", "the index names a file outside the checkpoint", file=directory / INDEX, actual=name
                )
        return sorted(set(weight_map.values())), weight_map
    if (directory / SINGLE).exists():
        return [SINGLE], {}
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise QmoeError(
            "E_UNSAFE_SOURCE",
            "only pickle weights here; convert them to safetensors first",
            file=directory / pickles[0],
        )
    raise QmoeError("E_MISSING", f"neither {SINGLE} nor {INDEX} here", file=directory)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[._]", name)] + [(2, 0, name)]


class SourceCheckpoint:
    """An open source directory. Use as a context manager.

    Attributes: `directory`, `config` (parsed config.json), `tensors` (name -> SourceTensor).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises `E_MISSING`, `E_UNSAFE_SOURCE`, `E_NAME`, `E_CORRUPT`, or what the safetensors parser refuses."""
        self.directory = Path(directory)
        self.tensors: dict[str, SourceTensor] = {}
        self._files: dict[str, Any] = {}  # shard name -> open _C.SafetensorsFile
        self._ordered: list[str] = []
        if self.directory.suffix in PICKLES:
            raise QmoeError("E_UNSAFE_SOURCE", "pickle files can run code and are never opened", file=directory)
        if not self.directory.is_dir():
            raise QmoeError("E_MISSING", "the source is not a directory", file=directory)
        names, weight_map = _weight_files(self.directory)
        if not (self.directory / "config.json").exists():
            raise QmoeError("E_MISSING", "the source has no config.json", file=self.directory)
        self.config = load_json(self.directory / "config.json")
        try:
            for name in names:
                self._open(name)
        except BaseException:
            self.close()
            raise
        for tensor, file in weight_map.items():
            if tensor not in self.tensors or self.tensors[tensor].file != file:
                raise QmoeError(
                    "E_MISSING",
                    "the index names a tensor that its file lacks",
                    file=self.directory / file,
                    tensor=tensor,
                )

    def _open(self, name: str) -> None:
        path = self.directory / name
        if not path.exists():
            raise QmoeError("E_MISSING", "a shard is absent", file=path)
        file = self._files[name] = _C.SafetensorsFile(path)
        for tensor, (dtype, shape, begin, end) in file.tensors.items():
            if tensor in self.tensors:
                raise QmoeError(
                    "E_NAME", f"the tensor is also in {self.tensors[tensor].file}", file=path, tensor=tensor
                )
            self.tensors[tensor] = SourceTensor(tensor, name, dtype, tuple(shape), begin, end)

    def __enter__(self) -> SourceCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _stat(self, name: str) -> os.stat_result:
        with io_errors(self.directory / name):
            return os.stat(self.directory / name)

    def ordered_names(self) -> list[str]:
        """Tensor names with numbers in numeric order: layer 2 before layer 10."""
        if not self._ordered:  # of thousands of names that takes a while
            self._ordered = sorted(self.tensors, key=_natural)
        return [*self._ordered]

    def read_range(self, tensor: SourceTensor, first: int, count: int) -> np.ndarray:
        """Bytes [first, first + count) of a tensor as uint8. Raises `E_IO` if the file has shrunk since it was
        opened."""
        data: np.ndarray = self._files[tensor.file].read_range(tensor.name, first, count)
        return data

    def chunks(self, tensor: SourceTensor, chunk_bytes: int = 8 << 20) -> Iterator[np.ndarray]:
        """A tensor's bytes, piece by piece."""
        for first in range(0, tensor.nbytes, chunk_bytes):
            yield self.read_range(tensor, first, min(chunk_bytes, tensor.nbytes - first))

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A float tensor, or entry `index` of its first dimension, in its stored dtype. Raises `E_DTYPE`, `E_IO`."""
        tensor = self.tensors[name]
        if tensor.dtype not in FLOAT_DTYPES:
            raise QmoeError(
                "E_DTYPE",
                "only 16- to 64-bit float weights can be compressed",
                file=self.directory / tensor.file,
                tensor=name,
                expected=sorted(FLOAT_DTYPES),
                actual=tensor.dtype,
            )
        shape, first, count = tensor.shape, 0, tensor.nbytes
        if index is not None:
            shape, count = shape[1:], tensor.nbytes // shape[0]
            first = index * count
        return torch.from_numpy(self.read_range(tensor, first, count)).view(FLOAT_DTYPES[tensor.dtype]).reshape(shape)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the content, for `E_CHANGED` and for qmoe.json, without reading everything.

        Per shard: its size, and one SHA-256 over its header (names, dtypes, shapes, offsets) and the first 4 KiB of
        every tensor. A retrained or re-exported tensor differs there almost surely, and all else is covered by the
        CRC32C of every tensor, which is taken while it is read for compression; hashing everything first would read
        the source twice.
        """
        shards: dict[str, Any] = {}
        by_file: dict[str, list[SourceTensor]] = {}
        for tensor in self.tensors.values():
            by_file.setdefault(tensor.file, []).append(tensor)
        for name in sorted(self._files):
            digest = hashlib.sha256()
            for tensor in sorted(by_file.get(name, []), key=lambda t: t.begin):
                digest.update(canonical_json([tensor.name, tensor.dtype, tensor.shape, tensor.begin, tensor.end]))
                digest.update(self.read_range(tensor, 0, min(_SAMPLE_BYTES, tensor.nbytes)).tobytes())
            shards[name] = {"bytes": self._stat(name).st_size, "sha256": digest.hexdigest()}
        with io_errors(self.directory):
            others = {
                name: hashlib.sha256((self.directory / name).read_bytes()).hexdigest()
                for name in ("config.json", *self.copied_files())
            }
        return {"shards": shards, "files": others}

    def modified(self) -> dict[str, int]:
        """Modification times (ns) of the shards. Equal times prove nothing, but another time means somebody has
        written the file, perhaps in a place that `fingerprint` does not sample; kept in the journal only, never in
        the output."""
        return {name: self._stat(name).st_mtime_ns for name in sorted(self._files)}

    def copied_files(self) -> list[str]:
        """Files that go into the compressed checkpoint unchanged: tokenizer, generation config, licence and the like.
        Weights of any kind, code and hidden files do not; config.json is rewritten."""
        with io_errors(self.directory):
            return sorted(
                entry.name
                for entry in os.scandir(self.directory)
                if entry.is_file()
                and not entry.name.startswith(".")
                and not entry.name.endswith(_NOT_COPIED)
                and entry.name not in _REPLACED
            )


Pieces = dict[str, list[tuple[int, int, int]]]  # by tensor: (first slice, CRC32C, bytes) of runs of slices


class CheckedReader:
    """Reads source tensors and keeps the CRC32C of what it read of each: all of it, or slices in ascending order.

    Attributes:
        pieces: what was read. Those of several readers that have read different slices add up (`add`).
    """

    def __init__(self, checkpoint: SourceCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.pieces: Pieces = {}
        self._next: dict[str, int] = {}  # slice that continues a tensor's last piece

    def read(self, name: str, index: int | None) -> torch.Tensor:
        data = self.checkpoint.read(name, index)
        pieces = self.pieces.setdefault(name, [])
        slice_ = index or 0
        first, crc, nbytes = pieces.pop() if pieces and self._next[name] == slice_ else (slice_, 0, 0)
        pieces.append((first, crc32c(data.flatten().view(torch.uint8).numpy(), crc), nbytes + data.nbytes))
        self._next[name] = slice_ + 1
        return data

    def add(self, others: Pieces) -> None:
        """Takes in what another reader has read."""
        for name, pieces in others.items():
            self.pieces.setdefault(name, []).extend(pieces)

    @property
    def crcs(self) -> dict[str, int]:
        """By tensor the CRC32C of all that was read of it, in the order of its slices."""
        result = {}
        for name, pieces in self.pieces.items():
            crc = 0
            for _, of_piece, nbytes in sorted(pieces):
                crc = crc32c_joined(crc, of_piece, nbytes)
            result[name] = crc
        return result
