"""Pruning of a model that is in memory, by way of its checkpoint: what `prune_checkpoint` does is done once only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import CalibrationSpec
from ..errors import QmoeError
from ..families import analyze
from ..progress import ProgressEvent
from ..source import SourceCheckpoint
from .job import prune_checkpoint
from .masks import Masks
from .report import PruneSettings


def prune(
    model: PreTrainedModel,
    data: Any = None,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str = "2:4",
    distribution: str = "uniform",
    *,
    roles: Sequence[str] = ("expert",),
    options: Mapping[str, float | int | str | bool] | None = None,
    device: str = "cpu",
    scratch: Path | None = None,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> Masks:
    """Prunes a model of transformers in place: weights that go become zero, and sparsegpt and alps update the others.

    Args:
        model: a Mixture-of-Experts model as `from_pretrained` gives it; it stays on its device and in its type.
        data: for calibrated methods: a `CalibrationSpec`, or 1-D token ids for one with its defaults.
        method, sparsity, pattern, distribution, roles, options: see `PruneSettings`.
        device: where calibrated methods compute.
        scratch: a directory for the checkpoint that it makes of the model on the way, twice the model's size; the
            system's for temporary files where there is none.

    Returns:
        The masks, by run-time parameter name, on the host.

    Raises:
        QmoeError: as `prune_checkpoint`.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import prune
        >>> model = AutoModelForCausalLM.from_pretrained(example_directory())
        >>> masks = prune(model, torch.arange(4096) % 512, "wanda", sparsity=0.75, pattern="unstructured")
        >>> masks.sparsity(), len(masks) == 2 * model.config.num_hidden_layers
        (0.75, True)
    """
    settings = PruneSettings(method, pattern, sparsity, distribution, tuple(roles), dict(options or {}))
    calibration = data
    if data is not None and not isinstance(data, CalibrationSpec):
        calibration = CalibrationSpec(data.cpu().numpy() if isinstance(data, torch.Tensor) else data)
    with TemporaryDirectory(dir=scratch) as directory:
        source, output = Path(directory) / "source", Path(directory) / "output"
        model.save_pretrained(source)
        report = prune_checkpoint(
            source, output, settings, calibration=calibration, device=device, progress=progress
        )  # fmt: skip
        _load(model, output, settings)
        return report.masks()


@torch.no_grad()
def _load(model: PreTrainedModel, directory: Path, settings: PruneSettings) -> None:
    """Copies the pruned weights of a checkpoint into a model of the same kind."""
    with SourceCheckpoint(directory) as checkpoint:
        layout = analyze(directory, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for target in layout.targets:
            if target.role not in settings.roles:
                continue
            if target.name not in parameters:
                raise QmoeError("E_LAYOUT", "the model has other parameters than its checkpoint", tensor=target.name)
            parameter = parameters[target.name]
            stack = parameter if target.kind == "experts" else parameter.unsqueeze(0)
            for place, matrix in zip(stack, target.matrices(checkpoint.read), strict=True):
                place.copy_(matrix.T if target.transposed else matrix)
