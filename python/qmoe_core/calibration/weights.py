"""Weights of one part of a model at a time, from the source checkpoint into modules that were built on meta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import QmoeError
from ..families import ModelLayout, NameMapping, Reader
from ..source import SourceCheckpoint


class WeightReader:
    """Knows which checkpoint tensors make which parameters and buffers of `model`, by transformers' own conversions."""

    def __init__(self, model: PreTrainedModel, checkpoint: SourceCheckpoint, layout: ModelLayout) -> None:
        """`layout`: of the model; it knows most of the names already."""
        self.model, self.checkpoint = model, checkpoint
        self._mapping = NameMapping(model)
        # Run-time name (of a conversion with several results: the first) -> conversion pattern -> checkpoint names.
        self._groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in checkpoint.ordered_names():
            target: str | None = layout.runtime_names.get(name)
            pattern = layout.patterns.get(name)
            if target is None:
                target, pattern = self._mapping.lookup(name)
            if target is not None:
                self._groups[target][pattern or ""].append(name)
        self._aliases: dict[int, list[str]] = defaultdict(list)  # tied parameters
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._aliases[id(parameter)].append(name)

    def fill(
        self, path: str, skip: Iterable[str], device: str, dtype: torch.dtype, read: Reader | None = None
    ) -> dict[str, nn.Parameter]:
        """Reads every parameter and persistent buffer below module `path`, except the parameters named in `skip`
        (run-time names), and puts them into the model.

        Parameters become `dtype`; buffers keep the dtype that the model gives them.

        Returns:
            The meta parameters that were replaced, by name, for `release`.

        Raises:
            QmoeError: `E_MISSING` where a parameter comes from no tensor, `E_SHAPE`, `E_DTYPE`, `E_IO`.
        """
        module, prefix, skipped = self.model.get_submodule(path), f"{path}.", set(skip)
        wanted = {prefix + name: p for name, p in module.named_parameters() if prefix + name not in skipped}
        values: dict[str, torch.Tensor] = {}
        for target, patterns in self._groups.items():
            names = self._results(target, patterns)
            if any(name in wanted or self._tied(name) & wanted.keys() for name in names):
                values |= self._convert(target, patterns, read or self.checkpoint.read)
            elif any(name.startswith(prefix) and name not in skipped for name in names):
                values |= self._convert(target, patterns, read or self.checkpoint.read)  # buffers
        for name in wanted:
            if name not in values:
                tied = self._tied(name) & values.keys()
                if not tied:
                    raise QmoeError("E_MISSING", "the checkpoint lacks a parameter of the model", tensor=name)
                values[name] = values[min(tied)]
        replaced = {}
        for name, value in values.items():
            if name.startswith(prefix) and name not in skipped:
                before = self._put(name, value, device, dtype)
                if before is not None:
                    replaced[name] = before
        return replaced

    def sources(self, path: str, skip: Iterable[str]) -> list[str]:
        """The checkpoint tensors that `fill` reads for parameters and buffers of module `path` itself, and not because
        they are tied to others."""
        prefix, skipped = f"{path}.", set(skip)
        return [
            name
            for target, patterns in self._groups.items()
            if any(result.startswith(prefix) and result not in skipped for result in self._results(target, patterns))
            for names in patterns.values()
            for name in names
        ]

    def _tied(self, name: str) -> set[str]:
        try:
            return set(self._aliases.get(id(self.model.get_parameter(name)), ())) - {name}
        except AttributeError:  # a buffer
            return set()

    def _results(self, target: str, patterns: dict[str, list[str]]) -> list[str]:
        """All run-time names that a group of checkpoint tensors fills."""
        for pattern in patterns:
            if pattern:
                head, *others = self._mapping.by_pattern[pattern].target_patterns
                return [target, *(target.replace(head, other) for other in others if head in target)]
        return [target]

    def _convert(self, target: str, patterns: dict[str, list[str]], read: Reader) -> dict[str, torch.Tensor]:
        if list(patterns) == [""]:
            return {target: read(patterns[""][0], None)}
        converter = deepcopy(self._mapping.by_pattern[next(iter(patterns))])
        for pattern, names in patterns.items():
            converter.collected_tensors[pattern] = [read(name, None) for name in names]  # type: ignore[misc, assignment]
        result = converter.convert(target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

    def _put(self, name: str, value: torch.Tensor, device: str, dtype: torch.dtype) -> nn.Parameter | None:
        """Replaces a parameter (returned) or fills a buffer."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        old = getattr(module, leaf)
        if old.shape != value.shape:
            raise QmoeError(
                "E_SHAPE",
                "a weight does not have the shape that config.json implies",
                tensor=name,
                expected=tuple(old.shape),
                actual=tuple(value.shape),
            )
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.to(device).to(dtype), requires_grad=False)
            return old
        module._buffers[leaf] = value.to(device, old.dtype)
        return None

    def release(self, replaced: dict[str, nn.Parameter]) -> None:
        """Puts the meta parameters back, so that the memory of the filled ones is free."""
        for name, parameter in replaced.items():
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = parameter


def compute_buffers(model: PreTrainedModel, device: str) -> None:
    """Gives a model built on meta the buffers that no checkpoint holds, such as rotary frequencies, by the model's own
    initialisation, the way transformers does when it loads a model.

    Raises:
        QmoeError: `E_LAYOUT` for a buffer that this initialisation does not set.
    """
    for path, module in model.named_modules():
        own = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        own = [name for name in own if module._buffers[name].device.type == "meta"]
        if not own:
            continue
        for name in own:
            buffer = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer.fill_(-(2**30))
        with torch.no_grad():
            model._init_weights(module)
        for name in own:
            buffer = module._buffers[name]
            if bool((buffer.isnan() if buffer.is_floating_point() else buffer == -(2**30)).any()):
                raise QmoeError(
                    "E_LAYOUT", "calibration cannot compute this buffer of the model", tensor=f"{path}.{name}"
                )
            module._buffers[name] = buffer.to(device)
