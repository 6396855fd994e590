"""Makes transformers open checkpoints whose config.json says `quant_method: "qmoe"`.

transformers has no plug-in discovery, so registration has to happen in the user's process. `install_hook`, called by
`import qmoe_core`, costs next to nothing: it imports neither torch nor transformers, and waits for transformers'
registry of quantizers to be imported. The quantizer itself is in `hf_quantizer`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register quant_method "qmoe" with transformers now (imports both). Does nothing the second time."""
    registry = importlib.import_module(_REGISTRY)
    ours = importlib.import_module(".hf_quantizer", __package__)
    if not hasattr(ours, "QmoeHfQuantizer"):
        return  # it is being imported, and its own imports brought us here; it registers when it is complete
    if ours.QUANT_METHOD not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        registry.register_quantization_config(ours.QUANT_METHOD)(ours.QmoeConfig)
    if ours.QUANT_METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantizer(ours.QUANT_METHOD)(ours.QmoeHfQuantizer)


class _RegisterAfterLoad(importlib.abc.Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # from here on an ordinary module to inspect, pickle and pkgutil
        module.__loader__ = self.loader
        register()


class _Finder(importlib.abc.MetaPathFinder):
    """Looks at one module name only; steps aside for every other, and while it asks the other finders for that one."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterLoad(spec.loader)
        return spec


def install_hook() -> None:
    """Register now if transformers' registry is already imported, else as soon as it is. Cheap and repeatable."""
    if _REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def __getattr__(name: str) -> Any:
    if name in ("QmoeConfig", "QmoeHfQuantizer"):
        return getattr(importlib.import_module(".hf_quantizer", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
