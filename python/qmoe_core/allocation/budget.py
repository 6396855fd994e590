"""Budgets in bytes: what "24GiB" means, and what a compressed directory takes besides its packed records."""

from __future__ import annotations

import math
import os
import re

from ..errors import QmoeError
from ..families import ModelLayout, Target
from ..formats import IntFormat
from ..plan import PlainItem, make_plan
from ..quantize import MethodSpec
from ..recipe import Recipe, Rule
from ..source import SourceCheckpoint
from ..store import ShardWriter, canonical_json

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}

# Room for what is written as text: the settings of one recipe rule, one file's name and size, one matrix's calibration
# (its tokens and a note), what qmoe.json says of the budget and its frontier, and all fixed keys of config.json and
# qmoe.json together.
_RULE, _FILE, _MATRIX, _FIT, _FIXED = 400, 120, 140, 8192, 4096


def parse_bytes(text: str | int) -> int:
    """A number of bytes: "24GiB" (1024-based), "24GB" (1000-based), "800 MB", "1.5GiB", "12345", or an int.

    Raises:
        QmoeError: `E_VALUE` for anything else, and for less than one byte.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        if match is None or match[2].lower() not in _UNITS:
            raise QmoeError("E_VALUE", "not a size", expected="for example 24GiB, 24GB, 800MB or 12345", actual=text)
        # Digits are read as an integer and a power of ten: 0.3 GB is 300,000,000 exactly.
        whole, _, fraction = match[1].partition(".")
        value = int(whole + fraction) * _UNITS[match[2].lower()] // 10 ** len(fraction)
    if value < 1:
        raise QmoeError("E_VALUE", "a size is at least one byte", actual=text)
    return value


def parameters(checkpoint: SourceCheckpoint) -> int:
    """Elements of all tensors of the source: what bits per parameter are counted over."""
    return sum(tensor.elements for tensor in checkpoint.tensors.values())


def bytes_for_bits(bits: float, checkpoint: SourceCheckpoint) -> int:
    """The bytes of a whole directory with `bits` per parameter. Raises `E_VALUE` for bits that are not positive."""
    if not math.isfinite(bits) or bits <= 0:
        raise QmoeError("E_VALUE", "bits per parameter must be positive", actual=bits)
    return int(bits * parameters(checkpoint) / 8)


def source_bytes(checkpoint: SourceCheckpoint, target: Target) -> int:
    """Bytes that a target takes where it is kept as it is: its tensors and what the directory says about them."""
    text = sum(3 * len(name) + 320 for name in target.source_names)
    return sum(checkpoint.tensors[name].nbytes for name in target.source_names) + text


def directory_overhead(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    targets: list[Target],
    *,
    max_shard_bytes: int = 5 * 10**9,
    calibrated: bool = False,
) -> int:
    """Bytes of the output directory besides the packed records of `targets`: all plain tensors, headers of the shards,
    copied files such as the tokenizer, config.json, the index and qmoe.json.

    Plain tensors and copied files are exact, headers are those of the plan at 8 bits, and the rest, texts whose
    numbers are not known yet, is estimated from above: kilobytes, or for thousands of experts megabytes, are left over.

    Args:
        targets: what will be packed.
        calibrated: whether qmoe.json will say how many tokens each matrix saw.
    """
    recipe = Recipe(
        tuple(
            Rule(target.name, (target.role,), MethodSpec("rtn", IntFormat(8, 32, scale_dtype="float32")))
            for target in targets
        )
    )
    plan = make_plan(checkpoint, layout, recipe, max_shard_bytes)
    total = _FIXED + _FIT
    plain_text: dict[str, object] = {}
    weight_map: dict[str, str] = {}
    # One more shard than planned: an estimate decides where the next one begins.
    total += 1024 + _FILE * (len(plan.shards) + 1)
    for index, shard in enumerate(plan.shards):
        file = plan.shard_name(index)
        total += ShardWriter.start_of_data([item.plan for item in shard])
        for item in shard:
            weight_map[item.plan.name] = file
            if isinstance(item, PlainItem):
                total += item.tensor.nbytes
                role = layout.roles[item.plan.name]
                plain_text[item.plan.name] = {"crc32c": 2**32 - 1, "file": file, "role": role}
    total += len(canonical_json(plain_text, indent=1)) + 4 * len(plain_text)  # qmoe.json indents it deeper
    if len(plan.shards) > 1:
        total += len(canonical_json(weight_map, indent=1)) + 4 * len(weight_map)
    for target in targets:
        total += _RULE + len(target.name) + _packed_text(target, calibrated)
    for name in checkpoint.copied_files():
        total += os.stat(checkpoint.directory / name).st_size + _FILE
    total += len(canonical_json(checkpoint.config, indent=2))
    total += len(canonical_json(checkpoint.fingerprint(), indent=1)) * 2  # indented deeper
    return total


def _packed_text(target: Target, calibrated: bool) -> int:
    """What qmoe.json and config.json say about a packed tensor, at most."""
    experts = target.shape[0]
    entry = {
        "module": target.module, "parameter": target.parameter, "kind": target.kind, "role": target.role,
        "shape": [2**40] * 3, "method": "x" * 24, "formats": {"x" * 24: experts}, "crc32c": 2**32 - 1,
        "nbytes": 2**50, "file": "model-00001-of-00001.safetensors", "bits_per_weight": 1.2345678,
        "relative_error": 1.2345678e-8, "zero_fraction": 1.2345678e-8,
        "sources": {name: 2**32 - 1 for name in target.source_names},
    }  # fmt: skip
    lines = 40 + len(target.source_names)
    text = len(canonical_json({target.packed_name: entry}, indent=1)) + 4 * lines
    return text + 300 + 2 * len(target.name) + (_MATRIX * experts + 200 if calibrated else 0)
