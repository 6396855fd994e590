"""Compression of a whole checkpoint: Hugging Face directory in, Hugging Face directory out.

Streaming: tensors are read, quantized and written one after the other; in memory are at most the codes of one stack
of experts and the float32 copy of one expert. Interruptible: whatever is finished is in the journal, and the same
call continues behind it. The files do not depend on how often that happened: nothing in them tells of time, place or
run.

Order of a job: the choice of formats where a budget is given (allocation/choose.py), lock, plan, calibration where a
method needs it (calibration/job.py), shards one by one, behind the calibration as far as it has come, other files,
qmoe.json, config.json, journal removed.
config.json comes last since without it nothing loads the directory.

Several processes (calibration/distributed.py) share the calibration; everything else the one that leads does alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from . import _C, __version__
from .allocation.choose import Fit, Planned, plan_output
from .calibration import CalibrationSpec
from .calibration.distributed import processes
from .calibration.job import CalibratedRecords, Calibration, follow, packed_entry, prepare
from .errors import QmoeError
from .families import ModelLayout, Target, analyze
from .formats import PackedTensor
from .journal import DIRECTORY, Journal, check_same_job
from .plan import PackedItem, PlainItem, Plan, make_plan
from .progress import ProgressEvent
from .quantize import MethodSpec, quantize
from .recipe import Recipe
from .report import CompressionReport, IoMeter, MemoryMeter, TensorEntry
from .source import INDEX, CheckedReader, SourceCheckpoint, load_json
from .store import ShardWriter, canonical_json, check_size, crc32c, io_errors, read_chunks, write_atomic

QMOE_JSON = "qmoe.json"
VERSION = 1  # of the output layout: quantization_config and qmoe.json
MAX_SHARD_BYTES = 4 << 30
SYNC_BYTES = 256 << 20  # a kill loses at most so much of finished work ...
SYNC_SECONDS = 2.0  # ... or that of so long; syncing every small tensor would cost more than redoing it

Progress = Callable[[ProgressEvent], None]


def compress(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Recipe | Fit,
    *,
    calibration: CalibrationSpec | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    planned: Callable[[dict[str, Any]], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CompressionReport:
    """Compresses a Hugging Face MoE checkpoint into a new directory.

    Args:
        source: directory with config.json and safetensors weights (16-, 32- or 64-bit floats).
        output: the directory to make: absent, empty, or left by an interrupted call with the same arguments, which is
            continued.
        recipe: which weights get which format; or a budget, for which formats are chosen.
        calibration: on which tokens, and how; needed where the recipe names a calibrated method, refused where not.
            With a budget both are right: it decides what formats there are to choose from.
        device: where calibrated methods compute: "cpu" or "cuda".
        progress: called with a `ProgressEvent` after each tensor, and in calibration (stage "calibrate") after each
            chunk of experts: bytes of the source done and in total; with a budget before that (stage "sensitivity").
        planned: called with `CompressionReport.fit` when formats have been chosen for a budget, on the first process.
        max_shard_bytes: an output shard is closed before it grows beyond this (a single larger tensor gets its own).

    Called by several processes (of torchrun, or of a torch.distributed process group that is there) with the same
    arguments, on a file system that all of them see, it divides the calibration among them, one device each. The result
    is that of one process but for the order of floating-point summation, and does not differ between runs with as many
    processes. Every process returns the report and raises what any of them does; progress is that of the first one.

    Returns:
        The report; the same numbers, less those of this run and process, are in OUT/qmoe.json.

    Raises:
        QmoeError: E_SAME_FILE (output is, contains or lies in the source), E_BUSY, E_CHANGED, E_UNSAFE_SOURCE,
            E_MISSING, E_LAYOUT, E_VALUE (NaN or infinite weights, recipe, a non-empty output, calibration missing or
            too short, too small a budget, or one that the finished output, which stays, exceeds because ternary records
            took more than was predicted), E_NO_KERNEL (device), E_NO_SPACE, E_IO, and what the safetensors parser
            refuses. After any of them the source is untouched and what is finished stays, to be continued.
    """
    started, meter, io = time.monotonic(), MemoryMeter(), IoMeter()
    source, output = Path(source), Path(output)
    if max_shard_bytes < 1:
        raise QmoeError("E_VALUE", "max_shard_bytes must be positive", actual=max_shard_bytes)
    with processes() as group, group.shared_errors(), SourceCheckpoint(source) as checkpoint:
        group.use(device)
        check_places(source, output)
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        layout = analyze(source, shapes)
        chosen: Planned | None = None
        if isinstance(recipe, Fit):
            found = read_qmoe_json(output) if group.leads and _is_finished(output) else None
            chosen = plan_output(
                checkpoint, layout, output, recipe, calibration, device=device, group=group,
                max_shard_bytes=max_shard_bytes, progress=progress, finished=group.from_leader(found),
            )  # fmt: skip
            recipe = chosen.recipe
            if planned is not None and group.leads:
                planned(chosen.summary)
            if not recipe.calibrated:
                calibration, device = None, "cpu"
        plan = make_plan(checkpoint, layout, recipe, max_shard_bytes)
        prepared = prepare(checkpoint, plan, calibration, device, group)
        job: dict[str, Any] = {
            "version": VERSION,
            "library": __version__,
            "core": _C.version(),
            "source": checkpoint.fingerprint(),
            "recipe": recipe.to_dict(),
            "max_shard_bytes": max_shard_bytes,
        }
        if chosen is not None:
            job["fit"] = chosen.summary
        if prepared is not None:
            job["calibration"] = prepared.description
        check_same_job(group.from_leader(job), job, output, "is not the same for all processes of this run")
        group.barrier()  # all agree before anything is written
        outcome: tuple[dict[str, Any], bool] | None = None
        if group.leads:
            outcome = _lead(checkpoint, layout, plan, output, job, progress, prepared)
        elif prepared is not None:
            follow(checkpoint, layout, plan, prepared, output / DIRECTORY)
        outcome = group.from_leader(outcome)
        assert outcome is not None
        result, resumed = outcome
        report = _report(output, result)
        if chosen is not None and report.bytes_on_disk > chosen.summary["budget"]:
            raise QmoeError(
                "E_VALUE",
                "the output is whole, but larger than the budget: its ternary records took more than was predicted",
                file=output, expected=f"<= {chosen.summary['budget']} bytes", actual=report.bytes_on_disk,
            )  # fmt: skip
    return CompressionReport(
        **{
            **vars(report),
            "largest_layer_bytes": plan.largest_layer_bytes,
            "calibration_memory_bytes": max(
                0 if prepared is None else prepared.memory_bytes, 0 if chosen is None else chosen.memory_bytes
            ),
            "read_bytes": io.read(),
            "written_bytes": io.written(),
            "start_rss_bytes": meter.start,
            "peak_rss_bytes": meter.peak(),
            "seconds": time.monotonic() - started,
            "resumed": resumed,
        }
    )


def _lead(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    plan: Plan,
    output: Path,
    job: dict[str, Any],
    progress: Progress | None,
    prepared: Calibration | None,
) -> tuple[dict[str, Any], bool]:
    """Everything that the output's only writer does. Returns the content of qmoe.json, and whether there was something
    to continue."""
    with Journal(output) as journal:
        result = _finished(output, job)
        resumed = result is not None
        if result is None:
            check_output(output)
            resumed = journal.begin({**job, "modified": checkpoint.modified()})
            result = _Job(checkpoint, layout, plan, journal, output, job, progress, prepared).run()
        elif prepared is not None:
            prepared.group.from_leader(None)  # nothing to calibrate
        journal.remove()
    return result, resumed


def check_places(source: Path, output: Path) -> None:
    """`E_SAME_FILE` unless source and output are separate directories, links resolved."""
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise QmoeError(
            "E_SAME_FILE",
            "the output is, contains or lies inside the source",
            file=output,
            expected="another directory",
            actual=str(b),
        )
    if output.exists() and not output.is_dir():
        raise QmoeError("E_VALUE", "the output exists and is not a directory", file=output)
    with io_errors(output):
        for entry in os.scandir(output) if output.exists() else ():
            if entry.is_symlink():  # e.g. a file that leads back into the source
                raise QmoeError("E_SAME_FILE", "the output holds a symbolic link", file=entry.path)


def check_output(output: Path) -> None:
    """`E_VALUE` for an output directory that holds files and no unfinished job of ours."""
    with io_errors(output):
        names = set(os.listdir(output)) - {DIRECTORY}
        if names and not (output / DIRECTORY / "job.json").exists():
            raise QmoeError(
                "E_VALUE",
                "the output directory is not empty and holds no unfinished compression",
                file=output,
                actual=sorted(names)[:5],
            )


def _is_finished(output: Path) -> bool:
    return (output / "config.json").exists() and (output / QMOE_JSON).exists()


def _finished(output: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """qmoe.json of a finished output of the same job; None if there is none. `E_CHANGED` if it is of another job."""
    if not _is_finished(output):
        return None
    result = read_qmoe_json(output)
    check_same_job(result["job"], job, output)
    for name, size in result["files"].items():
        check_size(output / name, size)
    return result


def read_qmoe_json(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed qmoe.json of a compressed checkpoint. Raises `E_MISSING`, `E_CORRUPT`, `E_VERSION`, `E_IO`."""
    path = Path(directory) / QMOE_JSON
    if not path.exists():
        raise QmoeError("E_MISSING", "not a compressed checkpoint: it has no qmoe.json", file=path)
    result = load_json(path)
    if result.get("version") != VERSION:
        raise QmoeError(
            "E_VERSION", "written by another version", file=path, expected=VERSION, actual=result.get("version")
        )
    if not all(isinstance(result.get(key), dict) for key in ("job", "files", "totals", "plain", "packed")):
        raise QmoeError("E_CORRUPT", "incomplete", file=path)
    return result


def load_report(directory: str | os.PathLike[str]) -> CompressionReport:
    """The report of a finished compression, from its qmoe.json (memory and time, which belong to a run, are 0)."""
    return _report(Path(directory), read_qmoe_json(directory))


def _report(output: Path, result: dict[str, Any]) -> CompressionReport:
    totals = result["totals"]
    return CompressionReport(
        output=str(output),
        recipe=result["job"]["recipe"],
        model_type=result["model_type"],
        architecture=result["architecture"],
        tensors=tuple(
            TensorEntry(name=name, **{**entry, "shape": tuple(entry["shape"])})
            for name, entry in result["packed"].items()
        ),
        original_parameters=totals["original_parameters"],
        original_bytes=totals["original_bytes"],
        bytes_on_disk=totals["bytes_on_disk"],
        files=result["files"],
        calibration=result["job"].get("calibration"),
        fit=result["job"].get("fit"),
    )


class _Job:
    """One run of a job that holds the lock: everything between planning and the finished directory."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layout: ModelLayout,
        plan: Plan,
        journal: Journal,
        output: Path,
        job: dict[str, Any],
        progress: Progress | None,
        calibration: Calibration | None,
    ) -> None:
        self.checkpoint, self.layout, self.plan, self.journal = checkpoint, layout, plan, journal
        self.output, self.job, self.progress = output, job, progress
        self.records: CalibratedRecords | None = None
        if calibration is not None:
            self.records = CalibratedRecords(checkpoint, layout, plan, calibration, journal, progress)
        self.calibrating = False  # shards are then written behind it, without a word
        self.done_bytes = 0
        self.total_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def run(self) -> dict[str, Any]:
        writing = self._shards()
        if self.records is not None:
            finals = [self.output / self.plan.shard_name(index) for index in range(len(self.plan.shards))]
            finished = {
                item.plan.name
                for final, shard in zip(finals, self.plan.shards, strict=True)
                if final.exists()
                for item in shard
            }

            def discard() -> None:
                for final in finals:
                    with io_errors(final):
                        final.unlink(missing_ok=True)

            try:
                self.calibrating = True
                self.records.make(finished, discard, lambda: next(writing))
                self.calibrating = False
                for _ in writing:
                    pass
                result = self._finish()
                self.records.wait()
            finally:
                writing.close()
                self.records.close()
            return result
        for _ in writing:
            pass
        return self._finish()

    def _shards(self) -> Generator[None, None, None]:
        """Writes all shards. Yields where a record may still come."""
        for index in range(len(self.plan.shards)):
            yield from self._shard(index)
        while self.calibrating:
            yield

    def _tell(self, stage: str, detail: str) -> None:
        if self.progress is not None and not self.calibrating:
            self.progress(ProgressEvent(stage, self.done_bytes, self.total_bytes, detail))

    # Shards.

    def _shard(self, index: int) -> Generator[None, None, None]:
        """Writes shard `index`, or what is missing of it. Yields as `_shards`, with all durable that is written."""
        shard, final = self.plan.shards[index], self.output / self.plan.shard_name(index)
        steps = [step for step in self.journal.steps if step.get("shard") == index]
        if not final.exists():
            part = self.journal.path / f"{index:05d}.part"
            steps = self._durable(part, index, steps)
            writer = ShardWriter(part, [item.plan for item in shard], [step["nbytes"] for step in steps])
            try:
                for item in shard[len(steps) :]:
                    while self.calibrating and isinstance(item, PackedItem) and not self._copied(item):
                        writer.sync()
                        self.journal.commit()
                        yield
                    entry = (
                        self._plain(writer, item)
                        if isinstance(item, PlainItem)
                        else self._packed(writer, item.target, item.spec)
                    )
                    self.journal.note({"shard": index, "name": item.plan.name, **entry})
                    self._sync(writer, entry, self._copied(item))
                    self._tell("compress", item.plan.name)
                writer.sync()
                self.journal.commit()
                writer.finish(final)
                if self.records is not None:
                    self.records.forget([item.plan.name for item in shard])
            finally:
                writer.close()
        else:  # a finished shard is complete in the journal: the rename comes after the commit
            self.done_bytes += sum(step["source_bytes"] for step in steps)
        if self._steps(index) != [item.plan.name for item in shard]:
            raise QmoeError(
                "E_CORRUPT", "the journal and a finished shard disagree; delete the output directory", file=final
            )
        self._tell("compress", final.name)

    def _copied(self, item: PlainItem | PackedItem) -> bool:
        """Whether a tensor is a record that is there already."""
        return isinstance(item, PackedItem) and self.records is not None and self.records.has(item.target)

    def _steps(self, index: int) -> list[str]:
        return [step["name"] for step in self.journal.steps if step.get("shard") == index]

    def _durable(self, part: Path, index: int, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The leading steps whose bytes are in the unfinished shard with the right CRC. After a power cut the file
        system may have kept the journal and lost data, whatever fsync promised; trusting it would put garbage under a
        valid checksum."""
        good = []
        if steps and part.exists():
            position = ShardWriter.start_of_data([item.plan for item in self.plan.shards[index]])
            with io_errors(part), open(part, "rb") as file:
                file.seek(position)
                for step in steps:
                    crc, left = 0, step["nbytes"]
                    while left and (chunk := file.read(min(left, 8 << 20))):
                        crc, left = crc32c(chunk, crc), left - len(chunk)
                    if left or crc != step["crc32c"]:
                        break
                    good.append(step)
        if len(good) < len(steps):
            self.journal.drop(steps[len(good) :])
        self.done_bytes += sum(step["source_bytes"] for step in good)
        return good

    def _sync(self, writer: ShardWriter, entry: dict[str, Any], copied: bool) -> None:
        """Every now and then makes what is written durable. `copied`: from a record, which can be copied again."""
        self._unsynced += entry["nbytes" if copied else "source_bytes"]
        if self._unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            writer.sync()
            self.journal.commit()
            self._unsynced, self._synced_at = 0, time.monotonic()
        elif copied:
            writer.flush()

    def _plain(self, writer: ShardWriter, item: PlainItem) -> dict[str, Any]:
        """Copies one tensor's bytes."""
        crc = 0
        for chunk in self.checkpoint.chunks(item.tensor):
            crc = crc32c(chunk, crc)
            writer.write(chunk.data)
        nbytes = writer.end_tensor()
        self.done_bytes += nbytes
        return {"nbytes": nbytes, "crc32c": crc, "source_bytes": nbytes}

    def _packed(self, writer: ShardWriter, target: Target, spec: MethodSpec) -> dict[str, Any]:
        """Quantizes and packs one stack of matrices, or takes over the record that calibration made of it."""
        if self.records is not None and self.records.has(target):
            entry = self.records.copy(target, writer)
            writer.end_tensor()
            self.done_bytes += entry["source_bytes"]
            return entry
        reader = CheckedReader(self.checkpoint)
        matrices, reports = [], []
        for expert, weight in enumerate(target.matrices(reader.read)):
            matrix, report = quantize(weight, spec, tensor=_matrix_name(target, expert))
            matrices.append(matrix)
            reports.append(report)
        packed = PackedTensor.pack(matrices)
        matrices.clear()
        writer.write(packed.data.data)
        writer.end_tensor()
        entry = packed_entry(self.checkpoint, target, spec, packed.nbytes, crc32c(packed.data), reports, reader.crcs)
        self.done_bytes += entry["source_bytes"]
        return entry

    # The other files.

    def _finish(self) -> dict[str, Any]:
        files = {self.plan.shard_name(index): 0 for index in range(len(self.plan.shards))}
        with io_errors(self.output):
            for name in files:
                files[name] = os.stat(self.output / name).st_size
        for name in self.checkpoint.copied_files():
            files[name] = write_atomic(self.output / name, read_chunks(self.checkpoint.directory / name))
        tensors: dict[str, Any] = {step["name"]: step for step in self.journal.steps if "shard" in step}
        weight_map = {name: self.plan.shard_name(step["shard"]) for name, step in tensors.items()}
        if len(self.plan.shards) > 1:
            index = {
                "metadata": {"total_size": sum(step["nbytes"] for step in tensors.values())},
                "weight_map": weight_map,
            }
            files[INDEX] = write_atomic(self.output / INDEX, canonical_json(index, indent=1) + b"\n")
        packed = {
            name: {**step["packed"], "nbytes": step["nbytes"], "crc32c": step["crc32c"], "file": weight_map[name]}
            for name, step in tensors.items()
            if "packed" in step
        }
        plain = {
            name: {"crc32c": step["crc32c"], "file": weight_map[name], "role": self.layout.roles[name]}
            for name, step in tensors.items()
            if "packed" not in step
        }
        config = (
            canonical_json(
                {**self.checkpoint.config, "quantization_config": self._quantization_config(packed)}, indent=2
            )
            + b"\n"
        )
        files["config.json"] = len(config)
        result = {
            "version": VERSION,
            "library": __version__,
            "job": self.job,
            "model_type": self.layout.model_type,
            "architecture": self.layout.architecture,
            "packed": packed,
            "plain": plain,
            "files": files,
            "totals": {
                "original_parameters": sum(tensor.elements for tensor in self.checkpoint.tensors.values()),
                "original_bytes": self.total_bytes,
            },
        }
        write_atomic(self.output / QMOE_JSON, _self_describing(result))
        write_atomic(self.output / "config.json", config)
        self._tell("finish", "config.json")
        return result

    @staticmethod
    def _quantization_config(packed: dict[str, Any]) -> dict[str, Any]:
        modules: dict[str, Any] = {}
        for entry in packed.values():
            module = modules.setdefault(entry["module"], {"kind": entry["kind"], "tensors": {}})
            formats = entry["formats"]
            module["tensors"][entry["parameter"]] = {
                "shape": entry["shape"],
                "nbytes": entry["nbytes"],
                "format": next(iter(formats)) if len(formats) == 1 else "mixed",
            }
        return {"quant_method": "qmoe", "version": VERSION, "packed": modules}


def _matrix_name(target: Target, expert: int) -> str:
    """How errors name one matrix: its checkpoint tensor where it has its own, else the stack and the number."""
    if target.kind == "linear":
        return target.source_names[0]
    return f"{target.name}[{expert}]"


def _self_describing(result: dict[str, Any]) -> bytes:
    """qmoe.json with its own size in its totals. Room for the longest number is reserved and what is left of it
    becomes spaces at the end, so that no search for a fixed point is needed and the size is the same in every run."""
    others = sum(result["files"].values())
    parameters = result["totals"]["original_parameters"]

    def render(size: int) -> bytes:
        total = others + size
        result["files"][QMOE_JSON] = size
        result["totals"] |= {"bytes_on_disk": total, "bits_per_parameter": float(f"{total * 8 / parameters:.7g}")}
        return canonical_json(result, indent=1)

    size = len(render(0)) + 64  # 64: more digits than the three numbers can gain
    return render(size).ljust(size - 1, b" ") + b"\n"
