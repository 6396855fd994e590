"""What storing a tensor in each candidate format would cost: the losses that an allocation adds up.

Streamed (`streamed.py`): with calibration, whatever the model's size. What `qmoe compress --fit --calibration` uses.

Weights (`weight_errors`): without calibration, the relative error energy of the weights alone.

Measured (`measure_sensitivity`): where the model fits into memory, each tensor alone is put into each candidate format,
and the KL divergence of the predictions from the original's is measured on some tokens. To second order in the weights'
errors these divergences add up over tensors whose errors are independent. It judges what the others predict.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import QmoeError
from ..families import ModelLayout, Target, analyze
from ..formats import Matrix, PackedTensor
from ..progress import ProgressEvent
from ..quantize import METHODS, MethodSpec, default_method, quantize
from ..recipe import Rule
from ..source import SourceCheckpoint
from .budget import source_bytes
from .problem import Candidate, Item

Settings = Mapping[str, Any]
# (record bytes, Q float32 (E, N, K)) of a stack W float32 (E, N, K) under candidate number `c` of the given spec.
Trial = Callable[[Target, torch.Tensor, int, MethodSpec], tuple[int, torch.Tensor]]
Progress = Callable[[ProgressEvent], None]

# Steps of about a third of a bit from 1 to 8: more would hardly differ in slope.
DATA_FREE: tuple[Settings, ...] = (
    {"format": "ternary", "options": {"threshold": 1.3}},
    {"format": "ternary", "options": {"threshold": 1.0}},
    {"format": "ternary", "options": {"threshold": 0.7}},
    {"format": "int2", "group": 128},
    {"format": "int2", "group": 64},
    {"format": "int2", "group": 32},
    {"format": "int3", "group": 128},
    {"format": "int3", "group": 32},
    {"format": "int4", "group": 128},
    {"format": "int4", "group": 32},
    {"format": "int8", "group": 128},
)


def tries_of(target: Target, candidates: Sequence[Settings]) -> list[tuple[int, Settings, MethodSpec | None]]:
    """(number, settings, what a rule of these settings would do) of the candidates that a target can have: "keep",
    where that is None, for linear layers only, since a packed experts module has all its tensors packed.
    Raises as `Rule.make`."""
    tries = []
    for number, settings in enumerate(candidates):
        spec = Rule.make(**settings, match=target.name, role=target.role).spec
        if spec is not None or target.kind == "linear":
            tries.append((number, settings, spec))
    return tries


def _stacked(matrices: Sequence[Matrix]) -> torch.Tensor:
    return torch.from_numpy(np.stack([matrix.dequantize() for matrix in matrices]))


def data_free(target: Target, weights: torch.Tensor, candidate: int, spec: MethodSpec) -> tuple[int, torch.Tensor]:
    """A `Trial` without statistics. A calibrated method is replaced by the format's default one, which ranks formats
    alike and takes a fraction of the time."""
    if METHODS[spec.method].needs_statistics:
        spec = MethodSpec(default_method(spec.format), spec.format)
    matrices = [quantize(weight.cpu(), spec, tensor=target.name)[0] for weight in weights]
    return PackedTensor.pack(matrices).nbytes, _stacked(matrices)


class CompressedTrials:
    """A `Trial` that takes candidate number c from a directory in which everything was compressed with it. So any
    method can be tried, calibrated ones included, at the price of one compression per candidate."""

    def __init__(self, directories: Sequence[str | os.PathLike[str]]) -> None:
        """Raises as `load_report`."""
        from ..checkpoint import load_report

        self.directories = [Path(directory) for directory in directories]
        self.files = [{entry.name: entry.file for entry in load_report(path).tensors} for path in self.directories]

    def __call__(
        self, target: Target, weights: torch.Tensor, candidate: int, spec: MethodSpec
    ) -> tuple[int, torch.Tensor]:
        """Raises `E_MISSING` where the directory has no such record, or as `PackedTensor`."""
        from safetensors import safe_open

        directory, file = self.directories[candidate], self.files[candidate].get(target.packed_name)
        if file is None:
            raise QmoeError("E_MISSING", "not compressed here", file=directory, tensor=target.packed_name)
        with safe_open(directory / file, framework="np") as shard:
            packed = PackedTensor(shard.get_tensor(target.packed_name))
        stack = np.stack([packed.decode(expert) for expert in range(packed.experts)])
        return packed.nbytes, torch.from_numpy(stack)


@contextmanager
def targets_of(directory: Path, roles: Iterable[str]) -> Iterator[tuple[SourceCheckpoint, ModelLayout, list[Target]]]:
    """The open source, its layout, and its targets of these roles. `E_VALUE` where there are none."""
    wanted = frozenset(roles)
    with SourceCheckpoint(directory) as checkpoint:
        layout = analyze(directory, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        targets = [target for target in layout.targets if target.role in wanted]
        if not targets:
            raise QmoeError("E_VALUE", "no weights of these roles in this model", file=directory, actual=sorted(wanted))
        yield checkpoint, layout, targets


def weight_errors(
    directory: str | os.PathLike[str],
    candidates: Sequence[Settings] = DATA_FREE,
    *,
    roles: Iterable[str] = ("expert",),
    progress: Progress | None = None,
) -> list[Item]:
    """Items by the errors of the weights alone: no tokens, no forward pass, one matrix in memory at a time. The loss is
    the relative error energy times the tensor's share of all weights.

    A poor judge of what matters to the model. Sizes are those of records of one matrix each, so a little too large.
    Arguments and errors as of `measure_sensitivity`.
    """
    rows = []
    with targets_of(Path(directory), roles) as (checkpoint, _, targets):
        for number, target in enumerate(targets):
            tries, energy = tries_of(target, candidates), 0.0
            sizes, errors = [0] * len(tries), [0.0] * len(tries)
            for weight in target.matrices(checkpoint.read):
                energy += float(weight.square().sum(dtype=torch.float64))
                for place, (candidate, _, spec) in enumerate(tries):
                    if spec is None:
                        sizes[place] = source_bytes(checkpoint, target)
                        continue
                    nbytes, quantized = data_free(target, weight.unsqueeze(0), candidate, spec)
                    sizes[place] += nbytes
                    errors[place] += float((weight - quantized[0]).square().sum(dtype=torch.float64))
            rows.append((target, tries, energy, sizes, errors))
            if progress is not None:
                progress(ProgressEvent("sensitivity", number + 1, len(targets), target.name))
    total = sum(math.prod(target.shape) for target, *_ in rows)
    items = []
    for target, tries, energy, sizes, errors in rows:
        weights = math.prod(target.shape)
        scale = weights / total / energy if energy > 0 else 0.0
        made = zip(sizes, errors, tries, strict=True)
        candidates_of = tuple(Candidate(size, error * scale, dict(settings)) for size, error, (_, settings, _) in made)
        items.append(Item(target.name, weights, candidates_of, target.role))
    return items


def measure_sensitivity(
    directory: str | os.PathLike[str],
    tokens: np.ndarray,
    candidates: Sequence[Settings] = DATA_FREE,
    *,
    roles: Iterable[str] = ("expert",),
    window: int = 512,
    max_tokens: int = 4096,
    batch_size: int = 4,
    trial: Trial = data_free,
    progress: Progress | None = None,
) -> list[Item]:
    """The KL divergence that each candidate format causes at each target alone, all other weights being the original's.

    Takes targets x candidates runs of the model over `max_tokens` tokens, the model in float32 and max_tokens x
    vocabulary x 4 bytes of memory.

    Args:
        tokens: (n,) calibration token ids, not those that a result is judged on.
        candidates: settings of recipe rules; {"format": "keep"} is tried for linear layers.
        roles: which targets get items.
        trial: how candidates are made; the losses are as good as it.
        progress: counts runs, stage "sensitivity".

    Returns:
        One item per target in run-time order; sizes are those of the trial, losses in nats per token.

    Raises:
        QmoeError: `E_VALUE` (no target of these roles, tokens), or as `analyze`, `Rule.make` and `quantize`.
    """
    from ..evaluation import _evaluating, _predict, _windows
    from ..generation import load_model

    directory, items = Path(directory), []
    with targets_of(directory, roles) as (checkpoint, _, targets):
        model = load_model(directory, dtype=torch.float32)
        ids = _windows(tokens, window, max_tokens, model.config.get_text_config(decoder=True).vocab_size)
        batches = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
        done, total = 0, sum(len(tries_of(target, candidates)) for target in targets)
        with _evaluating(model), torch.inference_mode():
            expected = [_predict(model, batch)[0] for batch in batches]
            for target in targets:
                weights = torch.stack(list(target.matrices(checkpoint.read)))
                parameter = model.get_submodule(target.module).get_parameter(target.parameter)
                kept, measured, tries = parameter.data, [], tries_of(target, candidates)
                for number, settings, spec in tries:
                    if spec is None:
                        measured.append(Candidate(source_bytes(checkpoint, target), 0.0, dict(settings)))
                    else:
                        nbytes, quantized = trial(target, weights, number, spec)
                        parameter.data = as_parameter(target, quantized, kept)
                        loss = _divergence(model, batches, expected, _predict)
                        measured.append(Candidate(nbytes, loss, dict(settings)))
                    done += 1
                    if progress is not None:
                        progress(ProgressEvent("sensitivity", done, total, target.name))
                parameter.data = kept
                items.append(Item(target.name, weights.numel(), tuple(measured), target.role))
    return items


def as_parameter(target: Target, stack: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Float32 (E, N, K) as the run-time parameter that it stands for, of `like`'s shape, type and device."""
    if target.transposed:
        stack = stack.transpose(1, 2)
    return (stack if target.kind == "experts" else stack[0]).to(like).contiguous()


def _divergence(
    model: Any, batches: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], predict: Callable[..., Any]
) -> float:
    """Mean KL(original || model) over all predicted tokens, in nats."""
    total, count = 0.0, 0
    for batch, reference in zip(batches, expected, strict=True):
        logp = predict(model, batch)[0]
        total += float(logp.neg_().add_(reference).mul_(reference.exp()).sum(dtype=torch.float64))
        count += logp.shape[0] * logp.shape[1]
    return total / count
