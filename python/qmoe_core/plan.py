"""The plan of a compression job: which output tensor goes into which shard, decided before anything is read.

Shards are filled by upper estimates, since the length of an entropy-coded record is known only when it is written; so
the number of shards, and with it their names, is known from the start. Within a shard plain tensors come first, wider
elements before narrower ones: safetensors allows no padding between tensors, and so each one stays aligned to its
element size.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .errors import QmoeError
from .families import ModelLayout, Target
from .formats import IntFormat
from .quantize import MethodSpec
from .recipe import Recipe
from .source import FLOAT_DTYPES, SourceCheckpoint, SourceTensor
from .store import DTYPE_BYTES, TensorPlan


@dataclass(frozen=True)
class PlainItem:
    """A tensor copied as it is, under its own name."""

    plan: TensorPlan
    tensor: SourceTensor


@dataclass(frozen=True)
class PackedItem:
    """A stack of matrices to quantize and pack."""

    plan: TensorPlan
    target: Target
    spec: MethodSpec


Item = PlainItem | PackedItem


@dataclass(frozen=True)
class Plan:
    """The shards in order, each with its tensors in order."""

    shards: tuple[tuple[Item, ...], ...]
    largest_layer_bytes: int  # of the source, at 2 bytes per parameter

    def shard_name(self, index: int) -> str:
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _estimate(target: Target, spec: MethodSpec) -> int:
    """About how many bytes the packed record will take; an estimate is enough to fill shards evenly."""
    experts, rows, cols = target.shape
    bits = (
        spec.format.bits + (40 / (spec.format.group or cols)) if isinstance(spec.format, IntFormat) else 2 + 32 / cols
    )
    return int(experts * rows * cols * bits / 8) + 256 * (experts + 1)


def layer_of(name: str) -> str:
    """The layer that a tensor name belongs to: everything up to the first number, or the name itself."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return name


def make_plan(checkpoint: SourceCheckpoint, layout: ModelLayout, recipe: Recipe, max_shard_bytes: int) -> Plan:
    """Decides for every tensor of the source. Raises `E_VALUE` (a rule matches nothing), `E_DTYPE`, `E_NAME`,
    `E_UNKNOWN`."""
    recipe.check_used({target.name: target.role for target in layout.targets})
    packed: dict[str, PackedItem] = {}  # by the first checkpoint tensor that goes into it
    consumed: set[str] = set()
    for target in layout.targets:
        decision = recipe.choose(target.name, target.role)
        if decision is None:
            continue
        for name in target.source_names:
            if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
                raise QmoeError(
                    "E_DTYPE",
                    "only float weights can be compressed",
                    tensor=name,
                    expected=sorted(FLOAT_DTYPES),
                    actual=checkpoint.tensors[name].dtype,
                )
        if target.packed_name in checkpoint.tensors:
            raise QmoeError(
                "E_NAME", "the source has a tensor of the name that the packed one needs", tensor=target.packed_name
            )
        spec = decision[1]
        plan = TensorPlan(target.packed_name, "U8", None, _estimate(target, spec))
        packed[target.source_names[0]] = PackedItem(plan, target, spec)
        consumed.update(target.source_names)

    layers: dict[str, int] = defaultdict(int)
    shards: list[list[Item]] = [[]]
    filled = 0
    for name in checkpoint.ordered_names():
        tensor = checkpoint.tensors[name]
        layers[layer_of(name)] += 2 * tensor.elements
        if tensor.dtype not in DTYPE_BYTES:
            raise QmoeError("E_UNKNOWN", "this element type is not known", tensor=name, actual=tensor.dtype)
        if name in packed:
            item: Item = packed[name]
        elif name in consumed:
            continue
        else:
            item = PlainItem(TensorPlan(name, tensor.dtype, tensor.shape, tensor.nbytes), tensor)
        if shards[-1] and filled + item.plan.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.plan.nbytes

    def order(item: Item) -> tuple[bool, int]:
        return isinstance(item, PackedItem), -DTYPE_BYTES[item.plan.dtype]

    # A single tensor of the largest width is no layer: copies stream, so only layers with compressed weights count.
    touched = {layer_of(name) for name in consumed}
    largest = max((layers[layer] for layer in touched), default=0)
    return Plan(tuple(tuple(sorted(shard, key=order)) for shard in shards), largest)
