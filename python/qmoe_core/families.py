"""Which checkpoint tensors make which compressible weight of the running model, for any model that transformers knows.

No table of families is kept here. The model is built on the meta device (no memory), its expert modules are found by
what transformers' experts interface sets on them, and checkpoint names are mapped to run-time names by transformers'
own weight conversion, the code that would load the model. So a family that transformers adds works here on the same
day, and one that it lays out in a way we do not know is refused (`E_LAYOUT`) with a list of what was found.

Two layouts of routed experts are known:
    fused     modules on the experts interface: gate_up_proj (E, 2I, H) or up_proj (E, I, H), and down_proj (E, H, I),
              or those transposed; the checkpoint holds them whole, or split by expert and by projection
    linears   a ModuleDict or ModuleList of small MLPs made of nn.Linear (Switch Transformers, NLLB-MoE)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .errors import QmoeError
from .roles import Roles

INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
FUSED_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

# Reads one checkpoint tensor as torch.Tensor, whole, or only entry `index` of its first dimension.
Reader = Callable[[str, "int | None"], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One compressible run-time weight: a stack of E matrices (N, K) = (out_features, in_features)."""

    module: str  # run-time path of the module, e.g. "model.layers.0.mlp.experts"
    parameter: str  # "gate_up_proj", "up_proj", "down_proj"; "weight" of a linear layer
    kind: str  # "experts" or "linear"
    role: str
    shape: tuple[int, int, int]  # (E, N, K)
    sources: tuple[tuple[str, tuple[str, ...]], ...]  # per conversion pattern: checkpoint names in expert order
    transposed: bool = False  # the run-time parameter is (E, K, N)
    converter: WeightConverter | None = field(default=None, compare=False)
    model: PreTrainedModel | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The run-time parameter name."""
        return f"{self.module}.{self.parameter}"

    @property
    def packed_name(self) -> str:
        """The name of the packed record in a compressed checkpoint."""
        return self.name + "_qmoe"

    @property
    def source_names(self) -> list[str]:
        """All checkpoint tensors that go into this weight."""
        return [name for _, names in self.sources for name in names]

    @property
    def sliceable(self) -> bool:
        """Whether some of the matrices can be read without the others."""
        return self.converter is None or self._by_expert()

    def matrices(
        self, read: Reader, first: int = 0, last: int | None = None, together: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yields matrices `first` to `last` (all E by default) as float32 (N, K), reading as little at a time as the
        layout allows: the tensors of `together` experts, or one slice of a fused tensor; only where the conversion
        mixes experts, everything. Raises `E_SHAPE`."""
        experts = range(first, self.shape[0] if last is None else last)
        if self.converter is None:
            (_, (name,)) = self.sources[0]
            for expert in experts:
                yield self._oriented(read(name, expert if self.kind == "experts" else None))
        elif self._by_expert():
            for at in range(experts.start, experts.stop, together):  # the conversion's Python takes its time each time
                some = slice(at, min(at + together, experts.stop))
                parts = {pattern: [read(name, None) for name in names[some]] for pattern, names in self.sources}
                yield from map(self._oriented, self.converted(parts))
        else:
            whole = self.converted({pattern: [read(name, None) for name in names] for pattern, names in self.sources})
            for expert in experts:
                yield self._oriented(whole[expert])

    def _by_expert(self) -> bool:
        """Whether the conversion stacks the experts first and afterwards never touches the stacking dimension."""
        assert self.converter is not None
        first, *rest = self.converter.operations
        if not (isinstance(first, MergeModulelist) and first.dim == 0):
            return False
        return all(
            (isinstance(op, (Concatenate, Interleave)) and op.dim > 0)
            or (isinstance(op, Transpose) and op.dim0 > 0 and op.dim1 > 0 and not op.check_dims)
            for op in rest
        )

    def converted(self, parts: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """What the loader makes of checkpoint tensors, by conversion pattern: a stack, as the model has it."""
        converter = deepcopy(self.converter)
        assert converter is not None and self.model is not None
        for pattern, tensors in parts.items():
            converter.collected_tensors[pattern] = tensors  # type: ignore[assignment]  # tensors are allowed too
        result = converter.convert(self.name, model=self.model, config=self.model.config)[self.name]
        return result[0] if isinstance(result, list) else result

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix.to(torch.float32)
        if self.transposed:
            matrix = matrix.T
        if tuple(matrix.shape) != self.shape[1:]:
            raise QmoeError(
                "E_SHAPE",
                "a weight does not have the shape that config.json implies",
                tensor=self.name,
                expected=self.shape[1:],
                actual=tuple(matrix.shape),
            )
        return matrix.contiguous()


@dataclass(frozen=True)
class ModelLayout:
    """What `analyze` found out about a checkpoint."""

    model_type: str
    architecture: str
    targets: tuple[Target, ...]  # in run-time order
    roles: dict[str, str]  # checkpoint tensor name -> role
    runtime_names: dict[str, str]  # checkpoint tensor name -> run-time name
    patterns: dict[str, str]  # checkpoint tensor name -> conversion pattern, of those that one has


def build_meta_model(directory: Path) -> PreTrainedModel:
    """The model that config.json describes, on the meta device. Code shipped with a checkpoint is never run.

    Raises:
        QmoeError: `E_LAYOUT` where transformers does not know the model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise QmoeError(
            "E_LAYOUT", f"transformers {transformers.__version__} cannot read this config: {error}", file=directory
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise QmoeError(
            "E_LAYOUT", "the source is already quantized; compress the original 16-bit checkpoint", file=directory
        )
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise QmoeError(
            "E_LAYOUT",
            f"transformers {transformers.__version__} has no model class of this name",
            file=directory,
            actual=architecture,
        )
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return model


def fused_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules on the experts interface: its decorator leaves its flags on every instance."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "num_experts")
        and all(flag in vars(module) for flag in INTERFACE_FLAGS)
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and module.down_proj.ndim == 3
    }


def linear_experts(model: nn.Module) -> set[str]:
    """Paths of containers whose entries are the experts, each an MLP of nn.Linear."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) > 0:
            named_so = path.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
            entries = list(module.values()) if isinstance(module, nn.ModuleDict) else list(module)
            if named_so and all(any(isinstance(m, nn.Linear) for m in entry.modules()) for entry in entries):
                found.add(path)
    return found


def _refuse(model: PreTrainedModel) -> QmoeError:
    """`E_LAYOUT` that lists every expert-like module by class, with its parameters."""
    found: dict[str, int] = defaultdict(int)
    for path, module in model.named_modules():
        own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        looks_expert = "expert" in type(module).__name__.lower() or "expert" in path.rpartition(".")[2].lower()
        if looks_expert or any(len(shape) == 3 for shape in own.values()):
            tensors = ", ".join(f"{name} {shape}" for name, shape in own.items()) or "no parameters of its own"
            found[f"{type(module).__name__} ({tensors})"] += 1
    listing = "; ".join(f"{count} x {what}" for what, count in list(found.items())[:20]) or "no expert-like module"
    return QmoeError(
        "E_LAYOUT",
        f"no routed experts in a known layout in {type(model).__name__}; found: {listing}",
        expected="modules on transformers' experts interface, or a ModuleDict/ModuleList of MLPs",
        actual=model.config.model_type,
    )


class NameMapping:
    """Checkpoint names to run-time names, as transformers' loader does it."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()

    def lookup(self, name: str) -> tuple[str | None, str | None]:
        """(run-time name or None if the model has no such tensor, conversion pattern or None)."""
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and name in self.state:
            renamed, pattern = name, None  # already a run-time name: a renaming must not touch it
        return (renamed if renamed in self.state else None), pattern


def analyze(directory: Path, shapes: dict[str, tuple[int, ...]]) -> ModelLayout:
    """Maps a checkpoint onto the model it is for.

    Args:
        directory: holds config.json.
        shapes: every checkpoint tensor's name and shape.

    Raises:
        QmoeError: `E_LAYOUT` (no experts in a known layout, unknown or already quantized model), `E_MISSING` (a
            parameter of the model, or single experts, are absent), `E_SHAPE`.
    """
    model = build_meta_model(directory)
    fused, containers = fused_modules(model), linear_experts(model)
    if not fused and not containers:
        raise _refuse(model)
    roles = Roles(model, set(fused) | containers)
    mapping = NameMapping(model)

    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    role_of: dict[str, str] = {}
    runtime: dict[str, str] = {}
    conversions: dict[str, str] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = mapping.lookup(name)
        if target is None:
            role_of[name] = "other"  # the model ignores it (e.g. a draft head): copied as it is
            continue
        groups[target][pattern or ""].append(name)
        role_of[name] = roles.role(target)
        runtime[name] = target
        if pattern is not None:
            conversions[name] = pattern

    _check_complete(model, mapping, set(groups))
    targets = []
    for path, module in model.named_modules():
        if path in fused:
            for parameter in FUSED_PARAMETERS:
                value = getattr(module, parameter, None)
                if isinstance(value, nn.Parameter):
                    targets.append(_fused_target(model, path, parameter, groups, mapping, shapes))
        elif isinstance(module, nn.Linear) and f"{path}.weight" in groups:
            patterns = groups[f"{path}.weight"]
            names = patterns.get("", [])
            if len(patterns) == 1 and len(names) == 1 and module.weight.ndim == 2:
                shape = (1, *module.weight.shape)
                role = roles.role(f"{path}.weight")
                targets.append(Target(path, "weight", "linear", role, shape, (("", (names[0],)),)))
    architecture = type(model).__name__
    return ModelLayout(model.config.model_type, architecture, tuple(targets), role_of, runtime, conversions)


def _fused_target(
    model: PreTrainedModel,
    path: str,
    parameter: str,
    groups: Any,
    mapping: NameMapping,
    shapes: dict[str, tuple[int, ...]],
) -> Target:
    module = model.get_submodule(path)
    name = f"{path}.{parameter}"
    experts, first, second = getattr(module, parameter).shape
    transposed = bool(module.is_transposed)
    shape = (experts, second, first) if transposed else (experts, first, second)
    patterns = groups[name]
    if not patterns:  # not missing (that is checked before): a conversion with several results fills it
        raise QmoeError(
            "E_LAYOUT", "the loader makes this tensor together with others from the same sources", tensor=name
        )
    if list(patterns) == [""]:
        (source,) = patterns[""]
        expected = (experts, first, second)
        if shapes[source] != expected:
            raise QmoeError(
                "E_SHAPE",
                "a fused expert tensor has another shape than config.json implies",
                tensor=source,
                expected=expected,
                actual=shapes[source],
            )
        return Target(path, parameter, "experts", "expert", shape, (("", (source,)),), transposed)
    converter = mapping.by_pattern[next(iter(patterns))]
    absent = [pattern for pattern in converter.source_patterns if pattern not in patterns]
    if absent:
        raise QmoeError(
            "E_MISSING", "the checkpoint lacks part of the experts", tensor=name, expected=f"tensors like {absent[0]}"
        )
    sources = tuple((pattern, tuple(patterns[pattern])) for pattern in converter.source_patterns)
    if isinstance(converter.operations[0], MergeModulelist):
        for pattern, names in sources:
            if len(names) != experts:
                raise QmoeError(
                    "E_MISSING",
                    f"not every expert is in the checkpoint for '{pattern}': {_missing_experts(names, experts)}",
                    tensor=name,
                    expected=experts,
                    actual=len(names),
                )
    return Target(path, parameter, "experts", "expert", shape, sources, transposed, converter, model)


def _missing_experts(names: Sequence[str], experts: int) -> str:
    """Says which expert numbers are absent, where the names carry them."""
    numbers = {int(match[1]) for name in names if (match := re.search(r"experts\.(\d+)\.", name))}
    absent = sorted(set(range(experts)) - numbers)
    return f"absent: {absent[:8]}{'...' if len(absent) > 8 else ''}" if numbers else "their number is wrong"


def _check_complete(model: PreTrainedModel, mapping: NameMapping, provided: set[str]) -> None:
    """`E_MISSING` for a parameter that neither the checkpoint nor a tied weight provides."""
    covered = set(provided)
    for name in provided:  # one source may fill several parameters (fused query, key and value)
        for converter in mapping.converters:
            head, *others = converter.target_patterns
            if others and head in name:
                covered.update(name.replace(head, other) for other in others)
    by_identity: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity[id(parameter)].append(name)
    ignored = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_missing or [])]
    for names in by_identity.values():
        if not covered.intersection(names) and not any(p.search(name) for p in ignored for name in names):
            raise QmoeError("E_MISSING", "the checkpoint lacks a parameter of the model", tensor=names[0])
