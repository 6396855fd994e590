"""What part a tensor plays in a Mixture-of-Experts model: the recipe chooses by role.

Structure decides first (what sits next to the experts, what kind of module holds the tensor); names only where
structure says nothing. When in doubt a tensor is `other`, which nothing compresses.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

ROLES = ("expert", "shared_expert", "router", "attention", "dense", "norm", "embedding", "lm_head", "other")
# Routers choose the experts: at 4 bits they already pick others for 14 % of the tokens, so no recipe may name them.
# Norms are tiny; embeddings and the head are looked up or tied, and no packed module stands in for them.
COMPRESSIBLE = ("expert", "shared_expert", "attention", "dense")

_ROUTER_CLASS = re.compile(r"router$|gate$", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"^(router|gate|.*_router|shared_experts?_gate|e_score_correction_bias|.*correction_bias)$")
_SHARED = re.compile(r"shared.*(expert|mlp)")
_NORM = re.compile(r"norm|^ln_|layernorm|layer_norm", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_DENSE = re.compile(r"mlp|ffn|feed_?forward|dense|\bwi\b|\bwo\b|fc\d", re.IGNORECASE)


class Roles:
    """Assigns roles to the runtime parameter names of one model (built on any device, even meta)."""

    def __init__(self, model: PreTrainedModel, expert_modules: set[str]) -> None:
        """`expert_modules`: paths of the modules below which every tensor belongs to a routed expert."""
        self._modules = dict(model.named_modules())
        self._experts = expert_modules
        self._blocks = {path.rpartition(".")[0] for path in expert_modules}
        head = model.get_output_embeddings()
        self._head = {path for path, module in self._modules.items() if module is head} if head is not None else set()

    def _module_of(self, name: str) -> tuple[str, nn.Module]:
        path = name.rpartition(".")[0]
        while path not in self._modules:
            path = path.rpartition(".")[0]
        return path, self._modules[path]

    def role(self, name: str) -> str:
        """The role of a runtime tensor name such as "model.layers.0.mlp.experts.gate_up_proj"."""
        path, module = self._module_of(name)
        parts = name.split(".")
        ancestors = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if ancestors & self._experts:
            return "expert"
        for block in self._blocks & (ancestors | {""}):
            child = parts[block.count(".") + 1 if block else 0]
            child_module = self._modules.get(f"{block}.{child}" if block else child)
            if _ROUTER_NAME.match(child) or (
                child_module is not None and _ROUTER_CLASS.search(type(child_module).__name__)
            ):
                return "router"
        if any(_SHARED.search(part) for part in parts):
            return "shared_expert"
        kind = type(module).__name__
        if path in self._head or parts[0] == "lm_head":
            return "lm_head"
        if isinstance(module, nn.Embedding) or "embedding" in kind.lower():
            return "embedding"
        if _NORM.search(kind) or _NORM.search(parts[-2] if len(parts) > 1 else ""):
            return "norm"
        if any(_ATTENTION.search(part) for part in parts):
            return "attention"
        if isinstance(module, nn.Linear) and any(_DENSE.search(part) for part in parts):
            return "dense"
        return "other"
