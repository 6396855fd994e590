"""The transformers quantizer: packed modules for dense ones before loading, checks of every packed tensor after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _C
from ..errors import QmoeError
from ..runtime.experts import PackedExperts
from ..runtime.linear import PackedLinear
from ..runtime.packed import PackedShape
from .transformers import register

QUANT_METHOD = "qmoe"
CONFIG_VERSION = 1
SUFFIX = "_qmoe"

_MODULES = {"experts": PackedExperts, "linear": PackedLinear}


class QmoeConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint.

    Attributes:
        version: of this description.
        packed: runtime module name -> `{"kind": "experts" or "linear", "tensors": {name: entry}}`, where an entry is
            `{"shape": [E, N, K], "nbytes": n, "format": name}`.
    """

    def __init__(self, packed: Mapping[str, Any] | None = None, version: int = CONFIG_VERSION, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers takes plain strings too
        self.version = version
        self.packed = dict(packed) if isinstance(packed, Mapping) else packed
        kwargs.pop("quant_method", None)
        self.extra = kwargs.pop("extra", None) or kwargs

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, "version": self.version, "packed": self.packed, **self.extra}


class QmoeHfQuantizer(HfQuantizer):
    """Loads and saves compressed checkpoints. It does not compress: that is `qmoe compress`."""

    # transformers then refuses, with a clear message, to quantize a dense model while loading.
    requires_calibration = True
    quantization_config: QmoeConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.version != CONFIG_VERSION:
            raise QmoeError("E_VERSION", "quantization_config", expected=CONFIG_VERSION, actual=config.version)
        if not isinstance(config.packed, dict):
            raise QmoeError(
                "E_MISSING", "quantization_config has no 'packed' table", actual=type(config.packed).__name__
            )
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            kind = "cuda" if isinstance(place, int) else str(place).partition(":")[0]
            if kind == "cuda":
                found = _C.cuda_info()
                if not found["devices"]:
                    raise QmoeError("E_NO_KERNEL", f"no CUDA device for packed layers: {found['reason']}", actual=place)
            elif place is not None and kind not in ("cpu", "auto", "meta"):
                raise QmoeError("E_NO_KERNEL", "packed layers run on CPUs and CUDA devices", actual=str(place))

    def update_device_map(self, device_map: Any) -> Any:
        # "auto" would divide layers among devices by the sizes of weights that are not there.
        if device_map != "auto":
            return device_map
        return {"": torch.cuda.current_device() if _C.cuda_info()["devices"] else "cpu"}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # True keeps transformers from turning a wrong size into its own untyped error: it is checked, by name, after
        # loading.
        return param_name.endswith(SUFFIX)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """None: packed bytes keep their type. Without this a float tensor under a packed name would be cast to bytes in
        silence."""
        if dtype == torch.uint8:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        modules = dict(model.named_modules())
        self.names: dict[str, str] = {}
        for name, entry in (self.quantization_config.packed or {}).items():
            path = _runtime_name(name, modules, model.base_model_prefix)
            kind = entry.get("kind") if isinstance(entry, Mapping) else None
            tensors = entry.get("tensors") if isinstance(entry, Mapping) else None
            if kind not in _MODULES or not isinstance(tensors, Mapping):
                raise QmoeError(
                    "E_UNKNOWN", "packed module of unknown kind", tensor=name, expected=list(_MODULES), actual=kind
                )
            shapes = {key: PackedShape.parse(value, f"{name}.{key}{SUFFIX}") for key, value in tensors.items()}
            with torch.device("meta"):
                model.set_submodule(path, _MODULES[kind](modules[path], shapes, name))
            self.names[path] = name
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not hasattr(HfQuantizer, "get_new_dtype"):
            self._cast_renamed(model)
        for path, name in self.names.items():
            module = model.get_submodule(path)
            for key, shape in module.shapes.items():
                buffer = getattr(module, f"{key}{SUFFIX}")
                # transformers marks what it read from the checkpoint; unmarked memory holds whatever was there before.
                if not getattr(buffer, "_is_hf_initialized", False):
                    raise QmoeError("E_MISSING", "packed tensor not in the checkpoint", tensor=f"{name}.{key}{SUFFIX}")
                shape.check(buffer, f"{name}.{key}{SUFFIX}")
            module.settle()
        return model

    def _cast_renamed(self, model: Any) -> None:
        """Before that hook existed, transformers left tensors of a pre-quantized checkpoint in the stored dtype where
        the checkpoint's name for them is not the model's (Mixtral's router, say)."""
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            wanted = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and not kept.intersection(name.split(".")):
                parameter.data = parameter.data.to(wanted)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise QmoeError(
            "E_NO_KERNEL", "a compressed model cannot be turned back into a dense one; load the original instead"
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _runtime_name(name: str, modules: Mapping[str, nn.Module], prefix: str) -> str:
    """`name` in this model: a headless model (`AutoModel`) lacks the base prefix that the checkpoint's names carry."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in modules:
            return candidate
    found = sorted({type(m).__name__ for key, m in modules.items() if key.rpartition(".")[2] in ("experts", "mlp")})
    raise QmoeError("E_LAYOUT", "the model has no such module", tensor=name, actual=f"modules of type {found}")


register()
