"""Calibration within a compression job: packed records made layer by layer, durable, and taken up after a kill.

Calibration goes through the model in the order of its layers, shards are written in the order of their names, and one
record may have to wait for its shard, which is written as far as there are records. So each finished layer leaves its
records as files in the journal, where they stay until the shard that holds them is finished:

    record-NNNNN            one packed tensor
    activations-*           inputs of a layer (calibration/buffers.py)

A journal line per layer, written after all of that is on the disk, says what is there. A killed job goes on behind the
last layer whose line tells of activations: of fast layers not every one does (`Pipeline.keeps`).

Of several processes (`distributed.py`) one leads: it holds the journal and writes records; the others (`follow`) write
the activations of their windows only, which must be durable as well before the leader writes the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..behind import Behind, quick_switches
from ..errors import QmoeError
from ..families import ModelLayout, Target
from ..formats import RecordPieces
from ..journal import Journal
from ..plan import PackedItem, Plan
from ..progress import ProgressEvent
from ..quantize import METHODS, MethodSpec, TensorReport
from ..source import SourceCheckpoint
from ..store import ShardWriter, crc32c, io_errors, read_chunks, write_atomic
from .distributed import Group
from .experts import Measure, Observe
from .layer import LayerResult
from .pipeline import Decisions, Pipeline, check_device
from .spec import CalibrationSpec, CalibrationTokens, load_tokens
from .treatment import PackedStack, Rounding

DELETING = 8  # files at a time: some file systems take as long to give up a large one as to write it


@dataclass(frozen=True)
class Calibration:
    """What calibration needs; `description` is what the journal and qmoe.json say of it."""

    spec: CalibrationSpec
    tokens: CalibrationTokens
    device: str
    description: dict[str, Any]
    group: Group
    memory_bytes: int  # what it may take on top of what compression takes anyway


def prepare(
    checkpoint: SourceCheckpoint, plan: Plan, spec: CalibrationSpec | None, device: str, group: Group
) -> Calibration | None:
    """Loads the calibration tokens; None where no method of the plan is calibrated.

    Raises:
        QmoeError: `E_VALUE` (calibration missing, or given but not needed, too few tokens), `E_NO_KERNEL`, `E_MISSING`,
            `E_CORRUPT`, `E_LAYOUT` (not a decoder-only model).
    """
    check_device(device)
    calibrated = [item.plan.name for item in packed_items(plan) if METHODS[item.spec.method].needs_statistics]
    if not calibrated:
        if spec is not None:
            raise QmoeError(
                "E_VALUE", "calibration is given, but no method of the recipe uses it", expected="e.g. method 'gptq'"
            )
        if not device.startswith("cpu"):
            raise QmoeError("E_NO_KERNEL", "data-free methods run on the CPU only", expected="cpu", actual=device)
        return None
    if spec is None:
        method = next(item.spec.method for item in packed_items(plan) if METHODS[item.spec.method].needs_statistics)
        raise QmoeError(
            "E_VALUE",
            f"method '{method}' needs calibration: give text or tokens to calibrate on",
            tensor=calibrated[0].removesuffix("_qmoe"),
        )
    return load_calibration(checkpoint, spec, device, group)


def load_calibration(
    checkpoint: SourceCheckpoint, spec: CalibrationSpec, device: str, group: Group, measuring: bool = False
) -> Calibration:
    """The tokens that `spec` describes, once this model is known to run layer by layer on them. `measuring`: in the end
    the model's head will be in memory, too.

    Raises:
        QmoeError: `E_VALUE` (too few tokens, settings), `E_NO_KERNEL`, `E_MISSING`, `E_CORRUPT`, `E_LAYOUT` (not a
            decoder-only model).
    """
    check_device(device)
    if spec.dtype != "float32" and not device.startswith("cuda"):
        raise QmoeError("E_VALUE", "calibration on the CPU is in float32", expected="float32", actual=spec.dtype)
    config = checkpoint.config
    if config.get("is_encoder_decoder"):
        raise QmoeError(
            "E_LAYOUT",
            "calibration supports decoder-only models; this one has an encoder",
            file=checkpoint.directory,
            actual=config.get("model_type"),
        )
    text = _text_config(checkpoint.directory)
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and spec.window > longest:
        raise QmoeError(
            "E_VALUE", "a calibration window is longer than the model's context", expected=longest, actual=spec.window
        )
    tokens = load_tokens(spec, checkpoint.directory, int(text.vocab_size))
    if len(tokens.ids) < group.size:
        raise QmoeError(
            "E_VALUE",
            "fewer calibration windows than processes",
            expected=f">= {group.size}",
            actual=len(tokens.ids),
        )
    around = 4 * sum(t.elements for name, t in checkpoint.tensors.items() if "embed" in name)
    if measuring:  # as large as the embeddings, which it may be tied to
        around *= 2
    memory = spec.buffer_bytes + (3 + group.size) * spec.chunk_on("cpu") + around  # on CUDA far less of the host's
    description = tokens.describe(spec, device)
    if group.size > 1:
        description["processes"] = group.size  # the order of summation depends on it
    return Calibration(spec, tokens, group.device(device), description, group, memory)


def _text_config(directory: Path) -> Any:
    """The part of config.json that describes the decoder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return config.get_text_config(decoder=True)


# What takes a finished layer: see `run_layers`.
Keep = Callable[[LayerResult, int, list[dict[str, int]], list[Any]], None]


def packed_items(plan: Plan) -> list[PackedItem]:
    return [item for shard in plan.shards for item in shard if isinstance(item, PackedItem)]


class CalibratedRecords:
    """The records that calibration makes for one job."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layout: ModelLayout,
        plan: Plan,
        calibration: Calibration,
        journal: Journal,
        progress: Callable[[ProgressEvent], None] | None,
    ) -> None:
        self.checkpoint, self.layout, self.calibration = checkpoint, layout, calibration
        self.journal, self.progress = journal, progress
        items = packed_items(plan)
        self.decisions = _decisions(items)
        self._numbers = {item.plan.name: number for number, item in enumerate(items)}
        self._entries: dict[str, dict[str, Any]] = {}  # by packed name, as a shard's step has them
        self._fresh: dict[str, RecordPieces] = {}  # those of the layer that was just made
        self._deleting = Behind(ahead=16)  # gigabytes take a file system a while

    def _file(self, name: str) -> Path:
        return self.journal.path / f"record-{self._numbers[name]:05d}"

    def has(self, target: Target) -> bool:
        return target.packed_name in self._entries

    def copy(self, target: Target, writer: ShardWriter) -> dict[str, Any]:
        """Writes the record into a shard. Returns its entry for the journal. Raises `E_CORRUPT`."""
        entry, crc = self._entries[target.packed_name], 0
        if target.packed_name in self._fresh:
            for piece in self._fresh[target.packed_name].pieces:
                writer.write(piece.data)
            return entry
        file = self._file(target.packed_name)
        for chunk in read_chunks(file):
            crc = crc32c(chunk, crc)
            writer.write(chunk)
        if crc != entry["crc32c"]:
            raise QmoeError("E_CORRUPT", "a record in the journal is damaged; delete the output directory", file=file)
        return entry

    def forget(self, names: Iterable[str]) -> None:
        """Deletes records that are in a finished shard, behind what comes next: until `wait`."""
        self._deleting.do(partial(_delete, [self._file(name) for name in names if name in self._entries]))

    def wait(self) -> None:
        """Returns once all that is to be deleted is."""
        self._deleting.wait()

    def close(self) -> None:
        self._deleting.close(drop=False)

    def make(self, finished: set[str], discard: Callable[[], None], advance: Callable[[], None]) -> None:
        """Runs the calibration, or what is missing of it.

        Args:
            finished: names of tensors in finished shards.
            discard: deletes these shards, where what the journal tells of is not on the disk and all starts anew.
            advance: called behind every layer, in the thread that makes it durable: more records are there (`has`).
        """
        steps = resumable(self.journal, "records")
        if not all(
            self._sound(name, entry) for s in steps for name, entry in s["records"].items() if name not in finished
        ):
            self._start_anew(discard)
            steps = []
        for step in steps:
            self._entries |= step["records"]
        if steps and steps[-1]["layer"] + 1 == steps[-1]["layers"]:
            self.calibration.group.from_leader(None)
            remove_activations(self.journal.path)
            return

        def keep(result: LayerResult, layers: int, states: list[dict[str, int]], _: list[None]) -> None:
            self._keep(result, layers, states)
            advance()
            self._fresh.clear()

        start = self.calibration.group.from_leader(Start(len(steps), steps[-1]["states"] if steps else []))
        run_layers(
            self.checkpoint,
            self.layout,
            self.decisions,
            self.calibration,
            self.journal.path,
            self._tell,
            start,
            lambda: self._start_anew(discard),
            keep,
            last=True,
        )
        self._deleting.do(partial(remove_activations, self.journal.path))

    def _keep(self, result: LayerResult, layers: int, states: list[dict[str, int]]) -> None:
        """Makes a finished layer's records durable, and then the journal say so; `states`: of every process."""
        records = {}
        for stack in result.stacks:
            assert isinstance(stack, PackedStack) and isinstance(stack.treatment, Rounding)
            packed = stack.pack()
            self._fresh[stack.target.packed_name] = packed
            write_atomic(self._file(stack.target.packed_name), iter([piece.data for piece in packed.pieces]))
            records[stack.target.packed_name] = packed_entry(
                self.checkpoint,
                stack.target,
                stack.treatment.spec,
                packed.nbytes,
                packed.crc32c,
                stack.reports,
                stack.reader.crcs,
                stack.tokens,
            )
        self._entries |= records
        self.journal.note({"layer": result.index, "layers": layers, "records": records, "states": states})
        self.journal.commit()

    def _tell(self, done: int, total: int, detail: str) -> None:
        if self.progress is not None:
            self.progress(ProgressEvent("calibrate", done, total, detail))

    def _sound(self, name: str, entry: dict[str, Any]) -> bool:
        """Whether a record is on the disk as the journal says. A power cut can lose what fsync promised to keep."""
        file, crc = self._file(name), 0
        if not file.exists():
            return False
        for chunk in read_chunks(file):
            crc = crc32c(chunk, crc)
        return crc == entry["crc32c"]

    def _start_anew(self, discard: Callable[[], None]) -> None:
        discard()
        self._entries.clear()
        self.journal.rewind(0)


def resumable(journal: Journal, kind: str) -> list[dict[str, Any]]:
    """The steps of finished layers, up to the last one behind which a run can go on, or all of them where no layer is
    left. The journal forgets the others: these layers are run again."""
    steps = [step for step in journal.steps if "layer" in step and kind in step]
    if not steps or steps[-1]["layer"] + 1 == steps[-1]["layers"]:
        return steps
    last = max((number for number, step in enumerate(steps) if any(step["states"])), default=-1)
    if steps[last + 1 :]:
        journal.drop(steps[last + 1 :])
    return steps[: last + 1]


def remove_activations(directory: Path) -> None:
    """Deletes the activations of a finished run over the layers."""
    with io_errors(directory):
        _delete([file for pattern in ("activations-*", "experts-*") for file in directory.glob(pattern)])


def _delete(files: list[Path]) -> None:
    def delete(file: Path) -> None:
        with io_errors(file):
            file.unlink(missing_ok=True)

    with ThreadPoolExecutor(DELETING) as threads:
        list(threads.map(delete, files))


@dataclass(frozen=True)
class Start:
    """Where the leading process begins: at layer `layer`, whose inputs have the CRC32C `states`, by process and
    stream."""

    layer: int
    states: list[dict[str, int]]


def _decisions(items: list[PackedItem]) -> Decisions:
    return {item.target.name: (item.target, Rounding(item.spec)) for item in items}


def follow(
    checkpoint: SourceCheckpoint, layout: ModelLayout, plan: Plan, calibration: Calibration, directory: Path
) -> None:
    """The part of a process that does not lead in the calibration that another one makes records of
    (`CalibratedRecords.make`). `directory`: the journal's, which all processes must see. Raises as the leader does."""
    start: Start | None = calibration.group.from_leader(None)
    if start is None:
        return
    if not directory.is_dir():
        raise QmoeError("E_MISSING", "the output must be where all processes see it", file=directory.parent)
    run_layers(
        checkpoint,
        layout,
        _decisions(packed_items(plan)),
        calibration,
        directory,
        lambda *_: None,
        start,
        lambda: None,
        lambda *_: None,
        last=True,
    )


def run_layers(
    checkpoint: SourceCheckpoint,
    layout: ModelLayout,
    decisions: Decisions,
    calibration: Calibration,
    directory: Path,
    tell: Callable[[int, int, str], None],
    start: Start,
    start_anew: Callable[[], None],
    keep: Keep,
    measure: Measure | None = None,
    observe: Observe | None = None,
    found: Callable[[LayerResult], Any] = lambda _: None,
    last: bool = False,
) -> None:
    """Runs the layers from `start`, or all of them (after `start_anew`) where the activations of any process are not
    sound. `keep` takes each layer's results on the leading process, once all processes have made theirs durable, in a
    thread behind the computation (`Pipeline.keeping`): the layer, how many there are, the CRC32Cs of all processes'
    activations, and what `found` says on each of them. `measure`, `observe`: see `Pipeline`. `last`: no other run will
    follow."""
    group, spec = calibration.group, calibration.spec
    with (
        quick_switches(),
        Pipeline(
            checkpoint,
            layout,
            decisions,
            calibration.tokens.ids,
            spec,
            calibration.device,
            directory,
            tell,
            group,
            measure,
            observe,
        ) as pipeline,
    ):
        first = start.layer
        states = start.states[group.rank] if start.states else {}
        if not all(group.gather_all(pipeline.begin(first, states))):
            start_anew()
            first = 0
            pipeline.begin(0, {})
        for result in pipeline.layers(first):
            kept = pipeline.writes(result.index) and pipeline.kept == result.index + 1
            finished = pipeline.behind.do(partial(_finish, pipeline, result, kept, found(result), keep))
            if kept:
                pipeline.keep = finished
        if last:
            group.end_devices()
        pipeline.settle()
    group.barrier()  # nobody uses files any more


def _finish(pipeline: Pipeline, result: LayerResult, kept: bool, part: Any, keep: Keep) -> Future[None] | None:
    """Makes a layer durable: on all processes the next one's inputs, if `kept`, and on the leading one the rest, in
    `Pipeline.keeping`."""
    states = pipeline.commit() if kept else {}
    gathered = pipeline.aside.gather((states, part, [stack.reader.pieces for stack in result.stacks]))
    if gathered is None:
        return None
    for _, _, read in gathered[1:]:
        for stack, pieces in zip(result.stacks, read, strict=True):
            stack.reader.add(pieces)
    states_of, parts = [states for states, _, _ in gathered], [part for _, part, _ in gathered]
    return pipeline.keeping.do(partial(keep, result, pipeline.count, states_of, parts))


def packed_entry(
    checkpoint: SourceCheckpoint,
    target: Target,
    spec: MethodSpec,
    nbytes: int,
    crc: int,
    reports: list[TensorReport],
    sources: dict[str, int],
    tokens: list[int] | None = None,
) -> dict[str, Any]:
    """What the journal and qmoe.json say of a packed tensor."""
    total = reports[0]
    for report in reports[1:]:
        total = total + report
    entry: dict[str, Any] = {
        "module": target.module,
        "parameter": target.parameter,
        "kind": target.kind,
        "role": target.role,
        "shape": list(target.shape),
        "method": spec.method,
        "formats": dict(total.formats),
        "sources": sources,
        **_rounded(total, nbytes),
    }
    if total.relative_output_error is not None:
        entry["relative_output_error"] = float(f"{total.relative_output_error:.7g}")
    if tokens:
        entry["calibration"] = {
            "tokens": tokens,
            "min": min(tokens),
            "median": float(np.median(tokens)),
            "max": max(tokens),
            "notes": [
                f"expert {expert}: {note}" if target.kind == "experts" else note
                for expert, report in enumerate(reports)
                for note in report.notes
            ],
        }
    return {
        "nbytes": nbytes,
        "crc32c": crc,
        "source_bytes": sum(checkpoint.tensors[name].nbytes for name in target.source_names),
        "packed": entry,
    }


def _rounded(total: TensorReport, nbytes: int) -> dict[str, float]:
    """The measured numbers of qmoe.json, to 7 digits: more would only show the order of summation."""
    values = {
        "bits_per_weight": nbytes * 8 / total.weights,
        "relative_error": total.relative_error,
        "zero_fraction": total.zeros / total.weights,
    }
    return {name: float(f"{value:.7g}") for name, value in values.items()}
