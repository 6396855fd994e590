"""The parameters that a recovery tunes, of a whole model or of one layer of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import QmoeError
from ..families import NameMapping
from ..source import FLOAT_DTYPES, SourceCheckpoint
from .modules import stacks_of
from .spec import ROLE_CLASSES, RecoverySpec
from .stacks import rounded


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of the checkpoint that is not packed: its name there, the parameter it fills, its class, and its stored
    dtype."""

    name: str
    runtime: str
    kind: str
    dtype: torch.dtype


def plain_tensors(
    checkpoint: SourceCheckpoint, roles: Mapping[str, str], model: PreTrainedModel, spec: RecoverySpec
) -> list[PlainTensor]:
    """The plain tensors of the classes that `spec` tunes.

    Args:
        checkpoint: the compressed one. roles: name -> role, of its plain tensors. model: the original, on any device.

    Raises:
        QmoeError: E_LAYOUT for a tensor that is not one parameter of the running model as it is (fused or transposed
            when loading), E_VALUE for a class without tensors.
    """
    found = []
    mapping, parameters = NameMapping(model), dict(model.named_parameters(remove_duplicate=False))
    for name in checkpoint.ordered_names():
        kind = ROLE_CLASSES.get(roles.get(name, ""), roles.get(name, ""))
        dtype = FLOAT_DTYPES.get(checkpoint.tensors[name].dtype)
        if name not in roles or kind not in spec.parameters or dtype is None:
            continue
        runtime, pattern = mapping.lookup(name)
        if runtime is None or runtime not in parameters:
            continue  # a buffer, or a tensor that the model ignores
        if pattern is not None:
            raise QmoeError(
                "E_LAYOUT", f"class '{kind}' cannot be tuned: this tensor is converted in loading", tensor=name
            )
        found.append(PlainTensor(name, runtime, kind, dtype))
    absent = set(spec.parameters) - {"scales"} - {tensor.kind for tensor in found}
    if absent:
        raise QmoeError("E_VALUE", "recovery: the checkpoint has no plain tensors of a class", actual=sorted(absent))
    return found


@dataclass
class Values:
    """What a recovery found: per packed record the changes of its parts, per plain tensor its new value."""

    changes: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)


class Tunables:
    """Parameters by key, with their classes. Scales live in the model's `TunableStack`s; a plain tensor is its stored
    value plus its root mean square times a parameter that begins at zero, rounded to its stored dtype."""

    def __init__(self, model: nn.Module, plain: list[PlainTensor], spec: RecoverySpec) -> None:
        """Freezes all of `model` but its scales, and those where they are not to be tuned."""
        self.model, self.plain = model, plain
        self.stacks = stacks_of(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self.kinds: dict[str, str] = {}
        model.requires_grad_(False)
        if "scales" in spec.parameters:
            for name, stack in self.stacks.items():
                for number, part in enumerate(stack.parts):
                    assert isinstance(part.change, nn.Parameter)
                    self._add(f"{name}/{number}", part.change, "scales")
        self._base: dict[str, torch.Tensor] = {}
        self._rms: dict[str, torch.Tensor] = {}
        for tensor in plain:
            base = model.get_parameter(tensor.runtime).detach().float().clone()
            rms = base.square().mean().sqrt()
            self._base[tensor.name] = base
            self._rms[tensor.name] = torch.where(rms > 0, rms, torch.ones_like(rms))
            self._add(tensor.name, nn.Parameter(torch.zeros_like(base)), tensor.kind)

    def _add(self, key: str, parameter: nn.Parameter, kind: str) -> None:
        parameter.requires_grad_(True)
        self.parameters[key], self.kinds[key] = parameter, kind

    def overrides(self) -> dict[str, torch.Tensor]:
        """Run-time parameter name -> tuned value, for `torch.func.functional_call`."""
        return {
            tensor.runtime: rounded(
                torch.addcmul(self._base[tensor.name], self._rms[tensor.name], self.parameters[tensor.name]),
                tensor.dtype,
            )
            for tensor in self.plain
        }

    def call(self, *arguments: Any, **named: Any) -> Any:
        """The model's forward with the tuned parameters."""
        return torch.func.functional_call(self.model, self.overrides(), arguments, named)

    def groups(self, spec: RecoverySpec) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        kinds = sorted(set(self.kinds.values()))
        return [
            {"params": [p for key, p in self.parameters.items() if self.kinds[key] == kind], "lr": spec.rate(kind)}
            for kind in kinds
        ]

    def counts(self) -> dict[str, int]:
        """Class -> number of parameters."""
        result: dict[str, int] = {}
        for key, parameter in self.parameters.items():
            result[self.kinds[key]] = result.get(self.kinds[key], 0) + parameter.numel()
        return result

    @torch.no_grad()
    def values(self) -> Values:
        """Copies on the host: changes float32, plain tensors in their stored dtype."""
        changes = {
            name: [part.change.detach().cpu().clone() for part in stack.parts]  # type: ignore[operator, union-attr]
            for name, stack in self.stacks.items()
        }
        overrides = self.overrides()
        return Values(changes, {t.name: overrides[t.runtime].to("cpu", t.dtype) for t in self.plain})
