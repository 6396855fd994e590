"""Which parameters of a model are made sparse, as matrices (N, K) or stacks of them (E, N, K)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import QmoeError
from ..roles import COMPRESSIBLE


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: of the parameter in the model. module: that holds it as `attribute`. parameter: itself.
        transposed: whether it is (E, K, N), as the experts of gpt-oss are.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    transposed: bool = False

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape with in_features last, and a tensor like that in the parameter's shape: a
        view."""
        return tensor.mT if self.transposed else tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K)."""
        return tuple(self.matrices(self.parameter).shape)


def select_weights(
    model: nn.Module, roles: Sequence[str] = ("expert",), names: Sequence[str] | None = None
) -> dict[str, Weight]:
    """The weights that a method of this package is to make sparse, by parameter name, in the order of the model.

    Args:
        model: of transformers, or any other module.
        roles: "expert", "shared_expert", "attention", "dense", where the model has routed experts. In a model that has
            none, all linear layers but the one that makes its predictions are selected, whatever the roles.
        names: patterns of parameter names, such as "*.mlp.*.weight", instead of that: every parameter of 2 or 3
            dimensions that one of them matches.

    Raises:
        QmoeError: `E_VALUE` (unknown roles), `E_MISSING` (nothing is selected).
    """
    from ..families import fused_modules

    unknown = set(roles) - set(COMPRESSIBLE)
    if unknown:
        raise QmoeError("E_VALUE", "these roles are not pruned", expected=COMPRESSIBLE, actual=sorted(unknown))
    modules, fused = dict(model.named_modules()), fused_modules(model)
    chosen = _by_names(model, names) if names is not None else _by_roles(model, roles, fused)
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        if name in chosen and parameter.ndim in (2, 3):
            path, _, attribute = name.rpartition(".")
            transposed = path in fused and parameter.ndim == 3 and bool(getattr(fused[path], "is_transposed", False))
            weights[name] = Weight(name, modules[path], attribute, parameter, transposed)
    if not weights:
        what = f"names {list(names)}" if names is not None else f"roles {list(roles)}"
        raise QmoeError("E_MISSING", f"the model has no weights of {what}", actual=type(model).__name__)
    return weights


def _by_names(model: nn.Module, names: Sequence[str]) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(fnmatchcase(name, pattern) for pattern in names)}


def _by_roles(model: Any, roles: Sequence[str], fused: dict[str, nn.Module]) -> set[str]:
    from ..families import FUSED_PARAMETERS, linear_experts
    from ..roles import Roles

    linears = {f"{path}.weight".lstrip(".") for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    containers = linear_experts(model)
    if not fused and not containers:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {name for name in linears if head is None or model.get_submodule(name.rpartition(".")[0]) is not head}
    stacks = {f"{path}.{parameter}" for path in fused for parameter in FUSED_PARAMETERS}
    roles_of = Roles(model, set(fused) | containers)
    return {name for name in linears | stacks if name in stacks or "." in name if roles_of.role(name) in roles}
