"""Expert pruning of a whole checkpoint: the experts that matter least go, and what comes out is a smaller model of the
same kind.

First the model streams by, layer by layer as in calibration, and nothing is changed; what the experts do is added up
(`saliency.py`) and noted in the journal. Then tensors are copied, cut where they belong to experts (`smaller.py`).
A killed job continues with the next layer, or the next file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from ..source import EXPERTS_JSON, INDEX, SourceCheckpoint, load_json
from ..store import DTYPE_BYTES, ShardWriter, TensorPlan, canonical_json, check_size, read_chunks, write_atomic
from .saliency import SCORES, Collector, Sums, best_experts, merged
from .smaller import (
    Cut,
    check_keep,
    config_bytes,
    cuts,
    draft_layers,
    renamed,
    smaller_config,
    without_draft_layers,
)

VERSION = 1  # of pruned_experts.json
Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class PrunedLayer:
    """One layer's experts.

    Attributes:
        module: run-time path of the experts module. kept: their former numbers, ascending; what was expert kept[i] is
            now expert i.
        scores, tokens: of all former experts.
    """

    module: str
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ExpertReport:
    """What `prune_experts` did.

    Attributes:
        output: the directory. score: see `saliency.py`. experts, keep: per layer, before and after.
        layers: what was kept where. left_out: tensors of draft heads, which transformers does not load and which have
            experts that nobody watched; config.json promises none then.
        calibration: its settings and the SHA-256 of its tokens.
        parameters, original_parameters: elements of all tensors.

    Example:
        >>> from qmoe_core.sparsify import ExpertReport
        >>> ExpertReport("out", "reap", 8, 4, (), {}, parameters=60, original_parameters=100).to_dict()["keep"]
        4
    """

    output: str
    score: str
    experts: int
    keep: int
    layers: tuple[PrunedLayer, ...]
    calibration: dict[str, Any]
    parameters: int
    original_parameters: int
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    resumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def prune_experts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    keep: int | float,
    calibration: CalibrationSpec,
    *,
    score: str = "reap",
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertReport:
    """Makes a checkpoint with fewer experts per layer, which loads as a smaller model of the same class.

    Rows of routers, correction biases and biases of experts go with the experts; config.json says how many are left.

    Args:
        source: a decoder-only model, as for `compress` with calibration.
        output: absent, empty, or left by an interrupted call with the same arguments, which is continued.
        keep: how many experts stay in every layer, or (a float below 1) which share of them.
        score: "reap", "frequency", "ean_sum" or "ean_mean".

    Raises:
        QmoeError: as `compress`; `E_UNKNOWN` score; `E_VALUE` where the router needs more experts; `E_LAYOUT` for
            models whose experts cannot be taken out, such as those with different numbers of them.

    Example:
        >>> import tempfile, torch
        >>> from qmoe_core import CalibrationSpec
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import prune_experts
        >>> text = CalibrationSpec(torch.arange(2048).numpy() % 512, window=128)
        >>> report = prune_experts(example_directory(), tempfile.mkdtemp(), 0.5, text)
        >>> report.keep == report.experts // 2 == len(report.layers[0].kept)
        True
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    if score not in SCORES:
        raise QmoeError("E_UNKNOWN", "unknown score of experts", expected=sorted(SCORES), actual=score)
    if calibration.drift:
        raise QmoeError("E_VALUE", "expert pruning does not correct for drift", expected="drift=False", actual=True)
    with processes() as group, group.shared_errors(), SourceCheckpoint(source) as checkpoint:
        group.use(device)
        check_places(source, output)
        layout = analyze(source, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        counts = {target.shape[0] for target in layout.targets if target.kind == "experts"}
        if len(counts) != 1:
            raise QmoeError("E_LAYOUT", "expert pruning needs fused experts, equally many in every layer", file=source,
                            actual=sorted(counts))  # fmt: skip
        experts = counts.pop()
        count = round(keep * experts) if isinstance(keep, float) and 0 < keep < 1 else keep
        if type(count) is not int:
            raise QmoeError(
                "E_VALUE", "how many experts are kept", expected="an integer, or a share below 1", actual=keep
            )
        groups = check_keep(source, experts, count)
        prepared = load_calibration(checkpoint, calibration, device, group)
        job = {
            "version": VERSION, "library": __version__, "core": _C.version(), "source": checkpoint.fingerprint(),
            "keep": count, "score": score, "calibration": prepared.description,
        }  # fmt: skip
        check_same_job(group.from_leader(job), job, output, "is not the same for all processes of this run")
        config = smaller_config(checkpoint, experts, count)
        left_out = draft_layers(checkpoint, layout)
        if left_out:
            without_draft_layers(config)
        plain = cuts(checkpoint, layout, config, count)
        group.barrier()
        outcome: tuple[dict[str, Any], bool] | None = None
        if group.leads:
            with Journal(output) as journal:
                result = _finished(output, job)
                resumed = result is not None
                if result is None:
                    check_output(output)
                    resumed = journal.begin({**job, "modified": checkpoint.modified()})
                    run = _Job(checkpoint, layout, prepared, journal, output, job, progress)
                    result = run.run(config, plain, left_out, groups)
                else:
                    group.from_leader(None)
                journal.remove()
            outcome = result, resumed
        else:
            _follow(checkpoint, layout, prepared, output / DIRECTORY)
        outcome = group.from_leader(outcome)
        assert outcome is not None
        report = _report(output, outcome[0])
        return replace(report, seconds=time.monotonic() - started, resumed=outcome[1])


def _follow(checkpoint: SourceCheckpoint, layout: ModelLayout, prepared: Calibration, directory: Path) -> None:
    """The part of a process that does not lead."""
    start: Start | None = prepared.group.from_leader(None)
    if start is None:
        return
    if not directory.is_dir():
        raise QmoeError("E_MISSING", "the output must be where all processes see it", file=directory.parent)
    collector = Collector()
    run_layers(
        checkpoint, layout, {}, prepared, directory, lambda *_: None, start, lambda: None, lambda *_: None,
        observe=collector, found=collector.take,
    )  # fmt: skip


class _Job:
    """One run of a job that holds the lock."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layout: ModelLayout,
        calibration: Calibration,
        journal: Journal,
        output: Path,
        job: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.layout, self.calibration = checkpoint, layout, calibration
        self.journal, self.output, self.job, self.progress = journal, output, job, progress
        self.parameters = 0  # of the output

    def run(self, config: dict[str, Any], plain: list[Cut], left_out: list[str], groups: int) -> dict[str, Any]:
        sums = self._sums()
        kept = {module: best_experts(of, self.job["score"], self.job["keep"], groups) for module, of in sums.items()}
        files = self._write([*plain, *renamed(self.checkpoint, self.layout, kept)], kept)
        for name in self.checkpoint.copied_files():
            files[name] = write_atomic(self.output / name, read_chunks(self.checkpoint.directory / name))
        text = config_bytes(config)
        files["config.json"] = len(text)
        result = {
            "version": VERSION, "library": __version__, "job": self.job, "kept": kept, "sums": sums, "files": files,
            "parameters": self.parameters, "left_out": left_out,
            "original_parameters": sum(tensor.elements for tensor in self.checkpoint.tensors.values()),
        }  # fmt: skip
        write_atomic(self.output / EXPERTS_JSON, canonical_json(result, indent=1) + b"\n")
        write_atomic(self.output / "config.json", text)
        return result

    def _tell(self, stage: str, done: int, total: int, detail: str) -> None:
        if self.progress is not None:
            self.progress(ProgressEvent(stage, done, total, detail))

    def _sums(self) -> Sums:
        """What the experts of all layers do; from the journal, as far as it is there."""
        steps = resumable(self.journal, "sums")
        whole = bool(steps) and steps[-1]["layer"] + 1 == steps[-1]["layers"]
        start = None if whole else Start(len(steps), steps[-1]["states"] if steps else [])
        self.calibration.group.from_leader(start)
        if start is not None:
            collector = Collector()

            def keep(result: LayerResult, layers: int, states: list[dict[str, int]], parts: list[Any]) -> None:
                self.journal.note({"layer": result.index, "layers": layers, "states": states, "sums": merged(parts)})
                self.journal.commit()

            run_layers(
                self.checkpoint, self.layout, {}, self.calibration, self.journal.path,
                lambda done, total, detail: self._tell("calibrate", done, total, detail), start,
                lambda: self.journal.rewind(0), keep, observe=collector, found=collector.take,
            )  # fmt: skip
        remove_activations(self.journal.path)
        return {module: sums for step in self.journal.steps for module, sums in step.get("sums", {}).items()}

    def _write(self, tensors: list[Cut], kept: dict[str, list[int]]) -> dict[str, int]:
        """Writes the weight files that are not there yet, and the index. Returns the sizes of all."""
        by_file: dict[str, list[Cut]] = {}
        for cut in sorted(tensors, key=lambda cut: (-DTYPE_BYTES[cut.source.dtype], cut.source.begin, cut.name)):
            by_file.setdefault(cut.file, []).append(cut)
        sizes = {cut.name: _bytes(cut) for cut in tensors}
        self.parameters = sum(
            size // DTYPE_BYTES[cut.source.dtype] for cut, size in zip(tensors, sizes.values(), strict=True)
        )
        done, total = 0, sum(sizes.values())
        files: dict[str, int] = {}
        for file, here in sorted(by_file.items()):
            final = self.output / file
            if not final.exists():
                plans = [TensorPlan(cut.name, cut.source.dtype, cut.shape, sizes[cut.name]) for cut in here]
                writer = ShardWriter(self.journal.path / f"{file}.part", plans)
                try:
                    for cut in here:
                        for chunk in cut.chunks(self.checkpoint, kept.get(cut.module, [])):
                            writer.write(chunk.data)
                        writer.end_tensor()
                    writer.finish(final)
                finally:
                    writer.close()
            files[file] = final.stat().st_size
            done += sum(sizes[cut.name] for cut in here)
            self._tell("copy", done, total, file)
        if (self.checkpoint.directory / INDEX).exists():
            index = {"metadata": {"total_size": total}, "weight_map": {cut.name: cut.file for cut in tensors}}
            files[INDEX] = write_atomic(self.output / INDEX, canonical_json(index, indent=1) + b"\n")
        return files


def _bytes(cut: Cut) -> int:
    size = DTYPE_BYTES[cut.source.dtype]
    for extent in cut.shape:
        size *= extent
    return size


def _finished(output: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished output of the same job; None if there is none. `E_CHANGED` if it is of another job."""
    if not ((output / "config.json").exists() and (output / EXPERTS_JSON).exists()):
        return None
    result = load_json(output / EXPERTS_JSON)
    if result.get("version") != VERSION:
        raise QmoeError("E_VERSION", "written by another version", file=output / EXPERTS_JSON, expected=VERSION,
                        actual=result.get("version"))  # fmt: skip
    check_same_job(result.get("job", {}), job, output)
    for name, size in result["files"].items():
        check_size(output / name, size)
    return result


def _report(output: Path, result: dict[str, Any]) -> ExpertReport:
    import torch

    job, layers = result["job"], []
    for module, sums in result["sums"].items():
        scores = SCORES[job["score"]](torch.tensor(sums, dtype=torch.float64)).tolist()
        tokens = tuple(int(tokens) for tokens, _, _ in sums)
        layers.append(PrunedLayer(module, tuple(result["kept"][module]), tuple(scores), tokens))
    return ExpertReport(
        str(output), job["score"], len(layers[0].scores), job["keep"], tuple(layers), job["calibration"],
        result["parameters"], result["original_parameters"], tuple(result["left_out"]),
    )  # fmt: skip
