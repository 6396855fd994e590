"""qmoe_core: compress Mixture-of-Experts models from 16 bit to below 1 bit per parameter, and run them.

Importing this package imports neither torch nor transformers. It registers quant_method "qmoe" with transformers as
soon as transformers itself is imported, so that `AutoModelForCausalLM.from_pretrained(compressed_directory)` works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import QmoeError
from .formats import IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix, parse_format
from .integrations.transformers import install_hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import _C as _C
    from .allocation import Fit
    from .calibration import CalibrationSpec
    from .checkpoint import compress
    from .evaluation import EvalResult, evaluate
    from .generation import generate, load_model
    from .recipe import Recipe
    from .recovery import RecoverySpec, recover
    from .report import CompressionReport
    from .verification import verify

# Names that need torch (or are costly to import), by the module that defines them.
_LAZY = {
    "CalibrationSpec": "calibration",
    "CompressionReport": "report",
    "EvalResult": "evaluation",
    "Fit": "allocation",
    "Recipe": "recipe",
    "RecoverySpec": "recovery",
    "compress": "checkpoint",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_model": "generation",
    "recover": "recovery",
    "verify": "verification",
}

__all__ = [
    "CalibrationSpec",
    "CompressionReport",
    "EvalResult",
    "Fit",
    "IntFormat",
    "IntMatrix",
    "PackedTensor",
    "QmoeError",
    "Recipe",
    "RecoverySpec",
    "TernaryFormat",
    "TernaryMatrix",
    "__version__",
    "compress",
    "evaluate",
    "generate",
    "load_model",
    "parse_format",
    "recover",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would believe every name of it

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


install_hook()
