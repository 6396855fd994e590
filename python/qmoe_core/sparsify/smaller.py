"""A checkpoint with fewer experts: its config, and where the values of its tensors are in the original.

No table of families is kept here, either: the smaller model is built on the meta device, and whatever parameter has
another shape there is cut, along the dimension that differs, to the experts that stay (weights and biases of experts,
rows of routers, their correction biases).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers

from ..errors import QmoeError
from ..families import ModelLayout, build_meta_model
from ..plan import layer_of
from ..source import SourceCheckpoint, SourceTensor
from ..store import canonical_json

_COUNT = re.compile(r"expert")  # config keys that may say how many experts there are ...
_NO_COUNT = re.compile(r"per_tok|top_?k|shared|active|select|capacity|group|layer|period|step")  # ... but these do not
_CHOSEN = re.compile(r"experts_per_tok|^moe_top_?k|^top_?k|router_top_?k|num_selected_experts")
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")
_CHOSEN_GROUPS = ("topk_group", "num_limited_groups")
_DRAFT_LAYERS = ("num_nextn_predict_layers", "mtp_num_layers", "num_mtp_layers")
CHUNK = 8 << 20


@dataclass(frozen=True)
class Cut:
    """A tensor of the smaller checkpoint: `source`, cut along `dim` to some experts of `module` (None: as it is)."""

    name: str
    file: str
    shape: tuple[int, ...]
    source: SourceTensor
    dim: int | None = None
    module: str = ""

    def chunks(self, checkpoint: SourceCheckpoint, kept: list[int]) -> Iterator[np.ndarray]:
        """Its bytes, piece by piece, as uint8."""
        source = self.source
        if self.dim is None:
            yield from checkpoint.chunks(source, CHUNK)
        elif self.dim == 0:
            size = source.nbytes // source.shape[0]
            for expert in kept:
                for first in range(0, size, CHUNK):
                    yield checkpoint.read_range(source, expert * size + first, min(CHUNK, size - first))
        else:
            data = checkpoint.read_range(source, 0, source.nbytes)
            yield data.reshape(*source.shape, -1).take(kept, axis=self.dim).reshape(-1)


def _config_paths(config: Mapping[str, Any], experts: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a config says that there are so many experts."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _config_paths(value, experts, (*path, key))
        elif type(value) is int and value == experts and _COUNT.search(str(key)) and not _NO_COUNT.search(str(key)):
            yield (*path, key)


def _loaded_config(directory: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def routing_of(directory: Path) -> tuple[int, int, int]:
    """(experts that a token gets, groups that experts are in, groups that a token may choose from); 1 of 1 group where
    routers know none."""
    config = _loaded_config(directory).get_text_config(decoder=True).to_dict()
    chosen = max((v for key, v in config.items() if _CHOSEN.search(key) and type(v) is int), default=1)
    groups, chosen_groups = (
        next((config[key] for key in keys if type(config.get(key)) is int), 1) for keys in (_GROUPS, _CHOSEN_GROUPS)
    )
    return chosen, groups, chosen_groups


def check_keep(directory: Path, experts: int, keep: int) -> int:
    """The number of groups. Raises `E_VALUE` where a router could not do its work with `keep` of `experts` experts."""
    chosen, groups, chosen_groups = routing_of(directory)
    if not 0 < keep < experts:
        raise QmoeError("E_VALUE", "how many experts are kept", expected=f"1 to {experts - 1}", actual=keep)
    if keep % groups:
        raise QmoeError("E_VALUE", f"the router has {groups} groups of experts, of which equally many are kept",
                        expected=f"a multiple of {groups}", actual=keep)  # fmt: skip
    if keep // groups * chosen_groups < chosen or (groups > 1 and keep // groups < 2):
        raise QmoeError("E_VALUE", f"every token gets {chosen} experts of {chosen_groups} groups: more must be kept",
                        actual=keep)  # fmt: skip
    return groups


def smaller_config(checkpoint: SourceCheckpoint, experts: int, keep: int) -> dict[str, Any]:
    """config.json of the model with `keep` experts per layer. Raises `E_LAYOUT` where it is not known how to say so."""
    result = deepcopy(checkpoint.config)
    paths = list(_config_paths(_loaded_config(checkpoint.directory).to_dict(), experts))
    if not paths:
        raise QmoeError("E_LAYOUT", "the config does not say how many experts there are", file=checkpoint.directory,
                        expected=f"a key like num_experts with {experts}")  # fmt: skip
    for *parents, key in paths:
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = keep
    # A config may have the same number by another name; then that one is not to contradict.
    for *parents, key in _config_paths(result, experts):
        place = result
        for parent in parents:
            place = place[parent]
        place[key] = keep
    return result


def draft_layers(checkpoint: SourceCheckpoint, layout: ModelLayout) -> list[str]:
    """Tensors of layers that transformers does not load and that have experts of their own: draft heads. Nobody can
    watch these experts, so a smaller model is made without them."""
    ignored = [name for name in checkpoint.ordered_names() if name not in layout.runtime_names]
    layers = {layer_of(name) for name in ignored if re.search(r"\bexperts?\b", name)}
    return [name for name in ignored if layer_of(name) in layers]


def without_draft_layers(config: dict[str, Any]) -> None:
    """Changes a config.json so that it promises none."""
    for key, value in config.items():
        if isinstance(value, dict):
            without_draft_layers(value)
        elif key in _DRAFT_LAYERS:
            config[key] = 0


def cuts(checkpoint: SourceCheckpoint, layout: ModelLayout, config: dict[str, Any], keep: int) -> list[Cut]:
    """The tensors of the smaller checkpoint, but for those of single experts (`renamed`) and draft heads.

    Raises:
        QmoeError: `E_LAYOUT` where something differs in the smaller model that cannot be cut.
    """
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_bytes(canonical_json(config))
        after = {name: tuple(tensor.shape) for name, tensor in build_meta_model(Path(directory)).state_dict().items()}
    model = build_meta_model(checkpoint.directory)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets = [target for target in layout.targets if target.kind == "experts"]
    experts = targets[0].shape[0]
    if before.keys() != after.keys():
        raise QmoeError("E_LAYOUT", "the smaller model has other parameters",
                        actual=sorted(before.keys() ^ after.keys())[:3])  # fmt: skip
    modules = {target.module.rpartition(".")[0]: target.module for target in targets}
    differs: dict[str, tuple[int, str]] = {}
    for name, shape in before.items():
        if shape != after[name]:
            dims = [dim for dim, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
            blocks = [block for block in modules if name.startswith(f"{block}.")]
            if len(dims) != 1 or shape[dims[0]] != experts or after[name][dims[0]] != keep or not blocks:
                raise QmoeError("E_LAYOUT", "a parameter is no longer what it was with fewer experts", tensor=name,
                                expected=shape, actual=after[name])  # fmt: skip
            differs[name] = dims[0], modules[max(blocks, key=len)]
    for target in targets:
        if target.name not in differs:
            raise QmoeError("E_LAYOUT", "the config of the model does not decide how many experts it has",
                            tensor=target.name)  # fmt: skip

    result = []
    left = set(draft_layers(checkpoint, layout))
    for target in targets:
        if target.converter is None:
            continue
        if not target.sliceable:
            raise QmoeError("E_LAYOUT", "the checkpoint mixes experts in its tensors", tensor=target.source_names[0])
        for _, names in target.sources:
            left.update(names)
    for name, tensor in checkpoint.tensors.items():
        if name in left:
            continue
        runtime = layout.runtime_names.get(name)
        if runtime is None or runtime not in differs:
            result.append(Cut(name, tensor.file, tensor.shape, tensor))
            continue
        dim, module = differs[runtime]
        if tensor.shape != before[runtime]:
            raise QmoeError("E_LAYOUT", "the checkpoint has this in another form than the model", tensor=name,
                            expected=before[runtime], actual=tensor.shape)  # fmt: skip
        shape = (*tensor.shape[:dim], keep, *tensor.shape[dim + 1 :])
        result.append(Cut(name, tensor.file, shape, tensor, dim, module))
    return result


def renamed(checkpoint: SourceCheckpoint, layout: ModelLayout, kept: Mapping[str, list[int]]) -> list[Cut]:
    """Tensors of single experts: those that stay take the names of the first ones."""
    result = []
    for target in layout.targets:
        if target.kind == "experts" and target.converter is not None:
            for _, names in target.sources:
                for name, expert in zip(names, kept[target.module], strict=False):
                    source = checkpoint.tensors[names[expert]]
                    result.append(Cut(name, checkpoint.tensors[name].file, source.shape, source))
    return result


def config_bytes(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2).encode() + b"\n"
