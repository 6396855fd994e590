"""The recovered checkpoint: the compressed one's shards again, tensor by tensor, with the tuned values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import QMOE_JSON, _Job, _self_describing
from ..errors import QmoeError
from ..families import ModelLayout
from ..formats import PackedTensor
from ..journal import Journal
from ..quantize.base import measure
from ..source import INDEX, CheckedReader, SourceCheckpoint
from ..store import DTYPE_BYTES, ShardWriter, TensorPlan, canonical_json, crc32c, read_chunks, write_atomic
from .stacks import TunableStack
from .tunables import Values


def record_of(checkpoint: SourceCheckpoint, name: str) -> PackedTensor:
    """A packed record. Raises `E_MISSING`, and what the record's parser refuses, naming the tensor."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise QmoeError("E_MISSING", "packed tensor not in the checkpoint", file=checkpoint.directory, tensor=name)
    try:
        return PackedTensor(checkpoint.read_range(tensor, 0, tensor.nbytes))
    except QmoeError as error:
        raise error.locate(tensor=name) from None


def _plain_bytes(value: torch.Tensor) -> np.ndarray:
    return value.contiguous().view(-1).view(torch.uint8).numpy()


class Output:
    """Writes a finished recovery. Shards go through the journal's directory; config.json comes last."""

    def __init__(
        self,
        source: SourceCheckpoint,
        compressed: SourceCheckpoint,
        layout: ModelLayout,
        qmoe: dict[str, Any],
        output: Path,
        journal: Journal,
    ) -> None:
        self.source, self.compressed, self.output, self.journal = source, compressed, output, journal
        self.qmoe = copy.deepcopy(qmoe)
        self.targets = {target.packed_name: target for target in layout.targets}
        self.sizes: dict[str, int] = {}

    def write(self, values: Values, job: dict[str, Any], recovery: dict[str, Any]) -> dict[str, Any]:
        """Everything. Returns the content of the new qmoe.json; raises `E_CHANGED` where the original's weights are
        not those that were compressed, `E_NO_SPACE`, `E_IO`."""
        files: dict[str, int] = {}
        by_file: dict[str, list[str]] = {}
        for tensor in sorted(self.compressed.tensors.values(), key=lambda t: (t.file, t.begin)):
            by_file.setdefault(tensor.file, []).append(tensor.name)
        for number, (file, names) in enumerate(by_file.items()):
            files[file] = self._shard(number, file, names, values)
        entries = {**self.qmoe["packed"], **self.qmoe["plain"]}
        for name in self.qmoe["files"]:
            if name in files or name in ("config.json", QMOE_JSON, INDEX):
                continue
            files[name] = write_atomic(self.output / name, read_chunks(self.compressed.directory / name))
        if len(by_file) > 1:
            index = {
                "metadata": {"total_size": sum(self.sizes.values())},
                "weight_map": {name: entries[name]["file"] for name in self.sizes},
            }
            files[INDEX] = write_atomic(self.output / INDEX, canonical_json(index, indent=1) + b"\n")
        described = _Job._quantization_config(self.qmoe["packed"])
        config = canonical_json({**self.compressed.config, "quantization_config": described}, indent=2) + b"\n"
        files["config.json"] = len(config)
        totals = {key: self.qmoe["totals"][key] for key in ("original_parameters", "original_bytes")}
        result = {**self.qmoe, "job": job, "recovery": recovery, "files": files, "totals": totals}
        write_atomic(self.output / QMOE_JSON, _self_describing(result))
        write_atomic(self.output / "config.json", config)
        return result

    def _shard(self, number: int, file: str, names: list[str], values: Values) -> int:
        plans = []
        for name in names:
            tensor = self.compressed.tensors[name]
            packed = name in self.qmoe["packed"]
            plans.append(TensorPlan(name, tensor.dtype, None if packed else tensor.shape, tensor.nbytes))
            assert packed or tensor.elements * DTYPE_BYTES[tensor.dtype] == tensor.nbytes
        writer = ShardWriter(self.journal.path / f"{number:05d}.part", plans)
        try:
            for name in names:
                if name in self.qmoe["packed"]:
                    data = self._packed(name, values)
                elif name in values.plain:
                    data = _plain_bytes(values.plain[name])
                    self.qmoe["plain"][name]["crc32c"] = crc32c(data)
                else:
                    tensor = self.compressed.tensors[name]
                    data = self.compressed.read_range(tensor, 0, tensor.nbytes)
                writer.write(data.data)
                self.sizes[name] = writer.end_tensor()
            return writer.finish(self.output / file)
        finally:
            writer.close()

    def _packed(self, name: str, values: Values) -> np.ndarray:
        """The record with tuned scales; its entry in qmoe.json is brought up to date."""
        entry, target = self.qmoe["packed"][name], self.targets[name]
        before = record_of(self.compressed, name)
        stack = TunableStack(before, name)
        with torch.no_grad():
            for part, change in zip(stack.parts, values.changes.get(name, []), strict=False):
                part.change.copy_(change)  # type: ignore[operator, union-attr]
        matrices = stack.repack(before)
        packed = PackedTensor.pack(matrices)
        reader = CheckedReader(self.source)
        reports = [
            measure(weight.numpy(), matrix)
            for weight, matrix in zip(target.matrices(reader.read), matrices, strict=True)
        ]
        if reader.crcs != entry["sources"]:
            raise QmoeError("E_CHANGED", "the original's weights are not those that were compressed", tensor=name)
        total = reports[0]
        for report in reports[1:]:
            total = total + report
        # What the calibration measured of the outputs no longer holds.
        entry.pop("relative_output_error", None)
        entry |= {
            "bits_per_weight": float(f"{packed.bits_per_weight:.7g}"),
            "relative_error": float(f"{total.relative_error:.7g}"),
            "zero_fraction": float(f"{total.zeros / total.weights:.7g}"),
            "nbytes": packed.nbytes,
            "crc32c": crc32c(packed.data),
        }
        return packed.data
