"""Pruning of a whole checkpoint: Hugging Face directory in, the same directory with zeros out, and the masks beside it.

Streaming: calibrated methods go layer by layer as calibrated compression does (`calibration/pipeline.py`), and every
layer sees what the pruned layers before it make of the text; the others go tensor by tensor. Interruptible: what is
finished is in the journal, and the same call continues. Nothing in the files tells of time, place or run.

Order of a job: lock, pruned tensors, then the others, files published, masks, other files, prune.json, config.json,
without which nothing loads the directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C, __version__
from ..calibration import CalibrationSpec
from ..calibration.distributed import processes
from ..calibration.job import Calibration, Start, load_calibration, remove_activations, resumable, run_layers
from ..calibration.layer import LayerResult
from ..checkpoint import check_output, check_places
from ..errors import QmoeError
from ..families import ModelLayout, analyze
from ..journal import DIRECTORY, Journal, check_same_job
from ..progress import ProgressEvent
from ..quantize.base import TensorReport
from ..report import MemoryMeter
from ..source import INDEX, MASKS, PRUNE_JSON, CheckedReader, SourceCheckpoint, load_json
from ..store import canonical_json, check_size, crc32c, read_chunks, write_atomic
from .maskfile import MaskInfo, mask_description, mask_info, write_masks
from .methods import METHODS
from .planning import Treatments, largest_layer, treatments_of
from .report import PrunedEntry, PruneReport, PruneSettings
from .shards import RewrittenShards
from .treatment import PrunedStack

VERSION = 1  # of prune.json
Progress = Callable[[ProgressEvent], None]


def prune_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: PruneSettings,
    *,
    calibration: CalibrationSpec | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes a Hugging Face MoE checkpoint into a new directory, which loads as the original does.

    Args:
        source: directory with config.json and safetensors weights.
        output: absent, empty, or left by an interrupted call with the same arguments, which is continued. Besides the
            checkpoint it gets masks.qmoe (`Masks.load`) and prune.json.
        calibration: on which tokens, for the methods that need it; refused for the others.
        device: where calibrated methods compute: "cpu" or "cuda".
        progress: called with a `ProgressEvent` after every chunk of experts, or every tensor.

    Called by several processes it divides the calibration among them, as `compress` does.

    Raises:
        QmoeError: as `compress`; `E_SHAPE` where a weight does not divide into the pattern's units.

    Example:
        >>> import tempfile
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import PruneSettings, prune_checkpoint
        >>> report = prune_checkpoint(example_directory(), tempfile.mkdtemp(), PruneSettings("magnitude", "2:4"))
        >>> report.sparsity, round(report.mask_bits_per_weight, 2)
        (0.5, 0.68)
    """
    started, meter = time.monotonic(), MemoryMeter()
    source, output = Path(source), Path(output)
    with processes() as group, group.shared_errors(), SourceCheckpoint(source) as checkpoint:
        group.use(device)
        check_places(source, output)
        layout = analyze(source, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        targets = [target for target in layout.targets if target.role in settings.roles]
        if not targets:
            raise QmoeError("E_VALUE", "the model has no weights of these roles", file=source, actual=settings.roles)
        prepared = _prepare(checkpoint, settings, calibration, device, group)
        job: dict[str, Any] = {
            "version": VERSION,
            "library": __version__,
            "core": _C.version(),
            "source": checkpoint.fingerprint(),
            "settings": settings.to_dict(),
        }
        if prepared is not None:
            job["calibration"] = prepared.description
        check_same_job(group.from_leader(job), job, output, "is not the same for all processes of this run")
        treatments = treatments_of(checkpoint, targets, settings)
        group.barrier()  # all agree before anything is written
        outcome: tuple[dict[str, Any], bool] | None = None
        if group.leads:
            outcome = _lead(checkpoint, layout, treatments, output, job, progress, prepared)
        elif prepared is not None:
            _follow(checkpoint, layout, treatments, prepared, output / DIRECTORY)
        outcome = group.from_leader(outcome)
        assert outcome is not None
        result, resumed = outcome
        return replace(
            report_of(output, result),
            largest_layer_bytes=largest_layer(checkpoint, targets),
            calibration_memory_bytes=0 if prepared is None else prepared.memory_bytes,
            start_rss_bytes=meter.start,
            peak_rss_bytes=meter.peak(),
            seconds=time.monotonic() - started,
            resumed=resumed,
        )


def _prepare(
    checkpoint: SourceCheckpoint, settings: PruneSettings, calibration: CalibrationSpec | None, device: str, group: Any
) -> Calibration | None:
    if METHODS[settings.method].needs_statistics:
        if calibration is None:
            raise QmoeError("E_VALUE", f"method '{settings.method}' needs calibration: give text or tokens")
        if calibration.drift:
            raise QmoeError("E_VALUE", "pruning does not correct for drift", expected="drift=False", actual=True)
        return load_calibration(checkpoint, calibration, device, group)
    if calibration is not None:
        raise QmoeError("E_VALUE", f"calibration is given, but method '{settings.method}' does not use it")
    if not device.startswith("cpu"):
        raise QmoeError("E_NO_KERNEL", "data-free methods run on the CPU only", expected="cpu", actual=device)
    return None


def _lead(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    treatments: Treatments,
    output: Path,
    job: dict[str, Any],
    progress: Progress | None,
    prepared: Calibration | None,
) -> tuple[dict[str, Any], bool]:
    """Everything that the output's only writer does."""
    with Journal(output) as journal:
        result = _finished(output, job)
        resumed = result is not None
        if result is None:
            check_output(output)
            resumed = journal.begin({**job, "modified": checkpoint.modified()})
            with RewrittenShards(checkpoint, output, journal.path) as shards:
                result = _Job(checkpoint, layout, treatments, journal, shards, output, job, progress, prepared).run()
        elif prepared is not None:
            prepared.group.from_leader(None)
        journal.remove()
    return result, resumed


def _follow(
    checkpoint: SourceCheckpoint, layout: ModelLayout, treatments: Treatments, prepared: Calibration, directory: Path
) -> None:
    """The part of a process that does not lead."""
    start: Start | None = prepared.group.from_leader(None)
    if start is None:
        return
    if not directory.is_dir():
        raise QmoeError("E_MISSING", "the output must be where all processes see it", file=directory.parent)
    nothing = lambda *_: None  # noqa: E731
    run_layers(checkpoint, layout, treatments, prepared, directory, nothing, start, nothing, nothing)


class _Job:
    """One run of a job that holds the lock."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layout: ModelLayout,
        treatments: Treatments,
        journal: Journal,
        shards: RewrittenShards,
        output: Path,
        job: dict[str, Any],
        progress: Progress | None,
        calibration: Calibration | None,
    ) -> None:
        self.checkpoint, self.layout, self.treatments, self.journal = checkpoint, layout, treatments, journal
        self.shards, self.output, self.job, self.progress = shards, output, job, progress
        self.calibration = calibration
        self.numbers = {name: number for number, name in enumerate(treatments)}
        for _, pruning in treatments.values():
            pruning.shards = shards
        self.total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        self.entries: dict[str, dict[str, Any]] = {}  # by target name: what the journal says of finished ones

    def run(self) -> dict[str, Any]:
        resumable(self.journal, "states")
        steps = self._sound_steps()
        if self.calibration is None:
            self._tensor_by_tensor()
        else:
            layers = [step for step in steps if "layer" in step]
            whole = bool(layers) and layers[-1]["layer"] + 1 == layers[-1]["layers"]
            start = None if whole else Start(len(layers), layers[-1]["states"] if layers else [])
            self.calibration.group.from_leader(start)
            if start is not None:
                run_layers(
                    self.checkpoint, self.layout, self.treatments, self.calibration, self.journal.path,
                    lambda done, total, detail: self._tell("calibrate", done, total, detail), start, self._start_anew,
                    self._keep,
                )  # fmt: skip
            remove_activations(self.journal.path)
        self._copy_others()
        return self._finish()

    def _tell(self, stage: str, done: int, total: int, detail: str) -> None:
        if self.progress is not None:
            self.progress(ProgressEvent(stage, done, total, detail))

    def _mask_file(self, name: str) -> Path:
        return self.journal.path / f"mask-{self.numbers[name]:05d}"

    # What is in the journal.

    def _sound_steps(self) -> list[dict[str, Any]]:
        """The journal's steps, if the files hold what they tell. A power cut can lose what fsync promised to keep; then
        all is done again."""
        for step in self.journal.steps:
            self.entries |= step.get("targets", {})
        written = {name: crc for entry in self.entries.values() for name, crc in entry["written"].items()}
        written |= {name: crc for step in self.journal.steps for name, crc in step.get("copied", {}).items()}
        sound = all(self.shards.checksum(self.checkpoint.tensors[name]) == crc for name, crc in written.items())
        if not sound or not all(self._mask_is_sound(name, entry) for name, entry in self.entries.items()):
            self._start_anew()
        return self.journal.steps

    def _mask_is_sound(self, name: str, entry: dict[str, Any]) -> bool:
        file, crc = self._mask_file(name), 0
        if not file.exists():
            return False
        for chunk in read_chunks(file):
            crc = crc32c(chunk, crc)
        return bool(crc == entry["mask"]["crc32c"])

    def _start_anew(self) -> None:
        self.entries.clear()
        self.journal.rewind(0)

    # Pruned tensors.

    def _tensor_by_tensor(self) -> None:
        done = 0
        for name, (target, pruning) in self.treatments.items():
            if name not in self.entries:
                stack = pruning.result(target, CheckedReader(self.checkpoint))
                shares = pruning.spec.sparsity
                for expert, weight in enumerate(target.matrices(stack.reader.read)):
                    own = shares[expert] if isinstance(shares, (list, tuple)) else shares
                    spec = replace(pruning.spec, sparsity=own)
                    made, report = pruning.of_matrix(weight, f"{name}[{expert}]", spec)
                    stack.add(made)
                    stack.reports.append(report)
                self._note([stack], {})
            done += sum(self.checkpoint.tensors[source].nbytes for source in target.source_names)
            self._tell("prune", done, self.total, name)

    def _keep(self, result: LayerResult, layers: int, states: list[dict[str, int]], _: list[None]) -> None:
        """Makes a finished layer durable, and then the journal say so; `states`: of every process's activations."""
        stacks = [stack for stack in result.stacks if isinstance(stack, PrunedStack)]
        self._note(stacks, {"layer": result.index, "layers": layers, "states": states})

    def _note(self, stacks: list[PrunedStack], step: dict[str, Any]) -> None:
        entries = {}
        for stack in stacks:
            name = stack.target.name
            mask = stack.mask(self.treatments[name][1].spec.pattern)
            write_atomic(self._mask_file(name), iter([mask.data.data]))
            entries[name] = {
                **_entry(stack), "mask": mask_description(mask.info), "sources": stack.reader.crcs,
                "written": stack.written,
            }  # fmt: skip
        files = {self.checkpoint.tensors[source].file for entry in entries.values() for source in entry["written"]}
        self.shards.sync(sorted(files))
        self.entries |= entries
        self.journal.note({**step, "targets": entries})
        self.journal.commit()

    # All else.

    def _copy_others(self) -> None:
        pruned = {source for target, _ in self.treatments.values() for source in target.source_names}
        done = sum(self.checkpoint.tensors[name].nbytes for name in pruned)
        copied = {name for step in self.journal.steps for name in step.get("copied", {})}
        for file in self.shards.names:
            tensors = [
                tensor for name, tensor in self.checkpoint.tensors.items()
                if tensor.file == file and name not in pruned and name not in copied
            ]  # fmt: skip
            crcs = {}
            for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
                crcs[tensor.name] = self.shards.copy(tensor)
                done += tensor.nbytes
                self._tell("copy", done, self.total, tensor.name)
            self.shards.sync([file])
            self.journal.note({"copied": crcs})
            self.journal.commit()

    def _finish(self) -> dict[str, Any]:
        files = self.shards.publish()
        infos = [mask_info(name, self.entries[name]["mask"]) for name in self.treatments]
        files[MASKS] = write_masks(self.output / MASKS, infos, (self._mask(info) for info in infos))
        names = [*self.checkpoint.copied_files(), *([INDEX] if (self.checkpoint.directory / INDEX).exists() else [])]
        for name in names:
            files[name] = write_atomic(self.output / name, read_chunks(self.checkpoint.directory / name))
        config = b"".join(read_chunks(self.checkpoint.directory / "config.json"))
        files["config.json"] = len(config)
        result = {"version": VERSION, "library": __version__, "job": self.job, "tensors": self.entries, "files": files}
        write_atomic(self.output / PRUNE_JSON, canonical_json(result, indent=1) + b"\n")
        write_atomic(self.output / "config.json", config)
        return result

    def _mask(self, info: MaskInfo) -> np.ndarray:
        return np.frombuffer(b"".join(read_chunks(self._mask_file(info.name))), dtype=np.uint8)


def _entry(stack: PrunedStack) -> dict[str, Any]:
    """The measured numbers of prune.json, to 7 digits: more would only show the order of summation."""
    total: TensorReport = sum(stack.reports[1:], stack.reports[0])
    values = {"sparsity": total.zeros / total.weights, "relative_error": total.relative_error}
    if total.relative_output_error is not None:
        values["relative_output_error"] = total.relative_output_error
    return {
        "role": stack.target.role,
        "shape": list(stack.target.shape),
        "pattern": next(iter(total.formats)),
        "tokens": stack.tokens,
        "notes": dict(total.notes),
        **{name: float(f"{value:.7g}") for name, value in values.items()},
    }


def _finished(output: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """prune.json of a finished output of the same job; None if there is none. `E_CHANGED` if it is of another job."""
    if not ((output / "config.json").exists() and (output / PRUNE_JSON).exists()):
        return None
    result = read_prune_json(output)
    check_same_job(result["job"], job, output)
    for name, size in result["files"].items():
        check_size(output / name, size)
    return result


def read_prune_json(directory: Path) -> dict[str, Any]:
    """The parsed prune.json of a pruned checkpoint. Raises `E_MISSING`, `E_CORRUPT`, `E_VERSION`, `E_IO`."""
    path = directory / PRUNE_JSON
    if not path.exists():
        raise QmoeError("E_MISSING", "not a pruned checkpoint: it has no prune.json", file=path)
    result = load_json(path)
    if result.get("version") != VERSION:
        raise QmoeError("E_VERSION", "written by another version", file=path, expected=VERSION,
                        actual=result.get("version"))  # fmt: skip
    if not all(isinstance(result.get(key), dict) for key in ("job", "tensors", "files")):
        raise QmoeError("E_CORRUPT", "incomplete", file=path)
    return result


def report_of(output: Path, result: dict[str, Any]) -> PruneReport:
    """The report in a prune.json (memory and time, which belong to a run, are 0)."""
    entries = tuple(
        PrunedEntry(
            name=name, role=entry["role"], shape=tuple(entry["shape"]), pattern=entry["pattern"],
            sparsity=entry["sparsity"], relative_error=entry["relative_error"],
            relative_output_error=entry.get("relative_output_error"), tokens=tuple(entry["tokens"]),
            notes=entry["notes"], sources=entry["sources"], written=entry["written"],
        )
        for name, entry in sorted(result["tensors"].items())
    )  # fmt: skip
    return PruneReport(
        str(output), result["job"]["settings"], entries, result["job"].get("calibration"), result["files"][MASKS]
    )
