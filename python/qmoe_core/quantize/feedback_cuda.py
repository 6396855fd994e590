"""The inner loop of `feedback` on a GPU."""

from __future__ import annotations

from typing import Any

import torch


def usable(weight: torch.Tensor) -> bool:
    """Whether `round_block` can run on the device that holds `weight`."""
    return False


def round_block(*arguments: Any) -> None:
    raise NotImplementedError
