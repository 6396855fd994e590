"""Models as the quality benchmarks evaluate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qmoe_core import load_model
from qmoe_core.recovery.modules import make_tunable
from qmoe_core.recovery.writing import record_of
from qmoe_core.source import SourceCheckpoint


def load_compressed(directory: Path, device: str) -> Any:
    """The compressed model in float32; on a GPU, where packed modules may lack kernels, with the same weights dense."""
    model = load_model(directory, dtype=torch.float32)
    if device != "cpu":
        with SourceCheckpoint(directory) as checkpoint:
            make_tunable(model, lambda name: record_of(checkpoint, name))
    return model.to(device)


def device_name(device: str) -> str | None:
    """For `common.write_results`: the GPU's name, or None for the processor's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None
