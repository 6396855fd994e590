"""A recovery from directories to a directory: checks, models, tuning with resume, the output."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.pipeline import check_device
from ..checkpoint import QMOE_JSON, _finished, _report, check_output, check_places, read_qmoe_json
from ..errors import QmoeError
from ..evaluation import _windows
from ..families import ModelLayout, analyze, build_meta_model
from ..journal import Journal, check_same_job
from ..progress import ProgressEvent
from ..source import SourceCheckpoint
from ..store import io_errors
from .blocks import Blocks
from .end_to_end import EndToEnd
from .modules import make_tunable
from .spec import RecoveryReport, RecoverySpec
from .training import State, load_state, save_state
from .tunables import PlainTensor, Tunables, Values, plain_tensors
from .writing import Output, record_of

Progress = Callable[[ProgressEvent], None]
STATE = "recovery.state"
_KEPT_LOSSES = 200


def recover(
    source: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    output: str | os.PathLike[str],
    tokens: np.ndarray,
    spec: RecoverySpec | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> RecoveryReport:
    """Tunes the continuous parameters of a compressed checkpoint so that it predicts what the original predicts.

    Args:
        source: the original checkpoint. compressed: what `compress` made of it. Both are only read.
        output: the directory to make: absent, empty, or left by an interrupted call with the same arguments, which is
            continued: from the last durable state, or in mode "block" behind the last finished layer. On the CPU with
            one thread the result has the same bytes as without the interruption; elsewhere the order of summation may
            differ.
        tokens: (n,) integer ids of text of the kind the model is for, not of the text that it is tested on. Cut into
            disjoint windows; the last `spec.validation` windows are not tuned on.
        device: "cpu" or "cuda". Mode "end-to-end" needs room for the original and for the compressed model with a
            byte per weight, and for one layer's weights in float32 at a time for the gradient.
        progress: called with a `ProgressEvent` (stage "recover", steps done and in total) after each step.

    Raises:
        QmoeError: E_CHANGED (the compressed checkpoint is of another source, or the output of another job), E_VALUE
            (too few tokens, ids outside the vocabulary, a class without tensors, divergence, naming the step),
            E_SAME_FILE, E_BUSY, E_NO_KERNEL (device), E_LAYOUT, E_NO_SPACE, E_IO, and what `verify` would refuse of
            the compressed checkpoint.
    """
    started = time.monotonic()
    spec = RecoverySpec() if spec is None else spec
    check_device(device)
    source, compressed, output = Path(source), Path(compressed), Path(output)
    qmoe = read_qmoe_json(compressed)
    with SourceCheckpoint(source) as original, SourceCheckpoint(compressed) as packed:
        check_places(source, output)
        check_places(compressed, output)
        check_same_job(qmoe["job"]["source"], original.fingerprint(), compressed)
        layout = analyze(source, {name: tensor.shape for name, tensor in original.tensors.items()})
        model = build_meta_model(source)
        windows = _cut(tokens, spec, model.config.get_text_config(decoder=True).vocab_size)
        roles = {name: entry["role"] for name, entry in qmoe["plain"].items()}
        plain = plain_tensors(packed, roles, model, spec)
        with io_errors(compressed):
            digest = hashlib.sha256((compressed / QMOE_JSON).read_bytes()).hexdigest()
        description = {
            **spec.to_dict(),
            "tokens": windows.numel(),
            "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "compressed_sha256": digest,
        }
        description.pop("checkpoint_every")
        job = {**qmoe["job"], "recovery": description}
        with Journal(output) as journal:
            result = _finished(output, job)
            resumed = result is not None
            if result is None:
                check_output(output)
                resumed = journal.begin({**job, "modified": original.modified() | packed.modified()})
                run = _Run(original, packed, layout, plain, windows, spec, device, journal, progress)
                recovery = run.tune()
                writer = Output(original, packed, layout, qmoe, output, journal)
                result = writer.write(run.values, job, recovery)
            journal.remove()
    report = _report(output, result)
    recovery = result["recovery"]
    return RecoveryReport(
        output=str(output),
        **{key: recovery[key] for key in ("initial", "final", "tuned", "tokens", "steps")},
        losses=tuple(recovery["losses"]),
        bytes_on_disk=report.bytes_on_disk,
        bits_per_parameter=report.bits_per_parameter,
        expert_bits_per_weight=report.expert_bits_per_weight,
        seconds=time.monotonic() - started,
        resumed=resumed,
    )


def _cut(tokens: np.ndarray, spec: RecoverySpec, vocabulary: int) -> torch.Tensor:
    """(n, window) int64. Raises `E_VALUE` for fewer windows than validation and one step need."""
    windows = _windows(tokens, spec.window, len(tokens), vocabulary)
    if spec.mode == "block":  # all batches have one size
        windows = windows[: len(windows) // spec.batch * spec.batch]
    least = spec.validation + spec.batch
    if len(windows) < least:
        raise QmoeError(
            "E_VALUE",
            "too few tokens for the validation windows and one step",
            expected=f">= {least * spec.window}",
            actual=len(tokens),
        )
    return windows


class _Run:
    """The tuning of one job that holds the lock."""

    def __init__(
        self,
        original: SourceCheckpoint,
        packed: SourceCheckpoint,
        layout: ModelLayout,
        plain: list[PlainTensor],
        windows: torch.Tensor,
        spec: RecoverySpec,
        device: str,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.original, self.packed, self.layout, self.plain = original, packed, layout, plain
        self.windows, self.spec, self.device, self.progress = windows, spec, device, progress
        self.journal = journal
        self.values = Values()

    def tune(self) -> dict[str, Any]:
        """Sets `values`; returns the section `recovery` of qmoe.json."""
        steps = self.spec.steps
        if self.spec.mode == "block":
            blocks = Blocks(
                self.original, self.packed, self.layout, self.plain, self.windows, self.spec, self.device,
                self.journal.path, self.progress,
            )  # fmt: skip
            initial, final, losses, self.values, tuned = blocks.run()
            steps *= blocks.count
        else:
            initial, final, losses, tuned = self._end_to_end()
        every = -(-len(losses) // _KEPT_LOSSES)
        return {
            "initial": float(f"{initial:.7g}"),
            "final": float(f"{final:.7g}"),
            "losses": [float(f"{loss:.5g}") for loss in losses[::every]],
            "tuned": tuned,
            "tokens": (len(self.windows) - self.spec.validation) * self.spec.window,
            "steps": steps,
        }

    def _end_to_end(self) -> tuple[float, float, list[float], dict[str, int]]:
        from ..generation import load_model

        dtype = torch.bfloat16 if self.spec.dtype == "bfloat16" else torch.float32
        teacher = load_model(self.original.directory, dtype=dtype, device=self.device)
        student = load_model(self.packed.directory, dtype=torch.float32)
        make_tunable(student, lambda name: record_of(self.packed, name))
        tunables = Tunables(student.to(self.device), self.plain, self.spec)
        path = self.journal.path / STATE

        def save(state: State) -> None:
            save_state(path, state)

        run = EndToEnd(teacher, tunables, self.windows, self.spec, self.device)
        initial, final, losses, self.values = run.run(load_state(path), save, self.progress)
        return initial, final, losses, tunables.counts()
