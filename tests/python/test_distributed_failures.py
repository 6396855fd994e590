"""Several processes on one calibration: whatever happens to one of them, all end, with the same error, and a rerun
continues."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import RECIPE, TOKENS, WINDOWS, free_port, hashes, meeting, sources, spec_of, together

from qmoe_core.calibration import distributed
from qmoe_core.checkpoint import compress
from qmoe_core.errors import QmoeError

__all__ = ["sources"]
MODEL = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch):
    monkeypatch.setattr("qmoe_core.calibration.pipeline.KEEP_SECONDS", 0.0)


@contextlib.contextmanager
def disturbed(call: str, number: int, what: Any):
    """Does `what` at the `number`-th call of os.`call`."""
    real, count = getattr(os, call), 0

    def changed(*arguments, **named):
        nonlocal count
        count += 1
        if count == number:
            what()
        return real(*arguments, **named)

    setattr(os, call, changed)
    try:
        yield
    finally:
        setattr(os, call, real)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(model: Path, output: Path, **changes: Any) -> bool:
    return compress(model, output, RECIPE, calibration=spec_of(**changes), max_shard_bytes=60_000).resumed


def refusals(outcomes: list[Any]) -> QmoeError:
    """The one error that all processes raised."""
    assert all(isinstance(outcome, QmoeError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    return outcomes[0]


def test_what_one_process_finds_all_of_them_raise(sources, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(sources("qwen3_moe"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"  # the second of two owns it
    tensors[name][3, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    error = refusals(together(2, tmp_path, lambda rank: run(damaged, tmp_path / "out")))
    assert error.code == "E_VALUE" and "NaN" in str(error) and "layers.1" in error.tensor


@pytest.mark.parametrize(("rank", "call", "number"), [(0, "replace", 3), (1, "pwrite", 2), (0, "posix_fallocate", 1)])
def test_a_full_disk_of_one_process_ends_all_and_the_same_call_continues(rank, call, number, sources, tmp_path):
    source = sources("qwen3_moe")

    def failing(own: int) -> bool:
        with disturbed(call, number, disk_full) if own == rank else contextlib.nullcontext():
            return run(source, tmp_path / "out")

    error = refusals(together(2, tmp_path, failing))
    assert error.code == "E_NO_SPACE" and str(tmp_path / "out") in error.file
    assert together(2, tmp_path, lambda rank: run(source, tmp_path / "out")) == [True, True]
    assert together(2, tmp_path, lambda rank: run(source, tmp_path / "reference")) == [False, False]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_one_killed_all_end_and_the_same_call_continues_to_the_same_bytes(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LEAVE_LOST_SECONDS", 0.5)
    source = sources("gpt_oss")
    assert together(2, tmp_path, lambda rank: run(source, tmp_path / "reference", drift=True)) == [False, False]
    moments = [
        (1, "pwrite", 1),
        (1, "pwrite", 4),
        (1, "fsync", 1),
        (0, "fsync", 3),
        (0, "fsync", 7),
        (0, "replace", 4),
    ]
    for victim, call, number in moments:

        def dying(rank: int, victim: int = victim, call: str = call, number: int = number) -> bool:
            with disturbed(call, number, die) if rank == victim else contextlib.nullcontext():
                return run(source, tmp_path / "out", drift=True)

        outcomes = together(2, tmp_path, dying)
        assert outcomes[victim] == signal.SIGKILL
        survivor = outcomes[1 - victim]
        assert isinstance(survivor, QmoeError) and survivor.code == "E_IO" and "lost" in str(survivor), survivor
        assert together(2, tmp_path, lambda rank: run(source, tmp_path / "out", drift=True)) in (
            [True] * 2,
            [False] * 2,
        )
        assert hashes(tmp_path / "out") == hashes(tmp_path / "reference"), (victim, call, number)
        assert not (tmp_path / "out" / ".qmoe-journal").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_process_that_shows_no_life_is_given_up(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LOST_SECONDS", 3.0)
    monkeypatch.setattr(distributed, "SIGN_SECONDS", 0.3)
    monkeypatch.setattr(distributed, "LEAVE_LOST_SECONDS", 1.0)
    source = sources("qwen3_moe")

    def stopping(rank: int) -> Any:
        if rank == 1:
            (tmp_path / "pid").write_text(str(os.getpid()))
            with disturbed("pwrite", 2, lambda: os.kill(os.getpid(), signal.SIGSTOP)):
                return run(source, tmp_path / "out")
        try:
            return run(source, tmp_path / "out")
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    error, ended = together(2, tmp_path, stopping)
    assert error.code == "E_IO" and "process 1" in str(error) and ended == signal.SIGKILL


def test_damaged_activations_of_one_process_are_made_anew(sources, tmp_path):
    source, journal = sources("qwen3_moe"), tmp_path / "out" / ".qmoe-journal"

    def dying(rank: int) -> bool:  # while records of the second layer are written
        with disturbed("replace", 8, die) if rank == 0 else contextlib.nullcontext():
            return run(source, tmp_path / "out")

    together(2, tmp_path, dying)
    damaged = journal / "activations-compressed-1of2-1"
    assert len(list(journal.glob("record-*"))) >= 6
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert together(2, tmp_path, lambda rank: run(source, tmp_path / "out")) == [True, True]
    assert together(2, tmp_path, lambda rank: run(source, tmp_path / "reference")) == [False, False]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_another_number_of_processes_is_another_job(sources, tmp_path):
    source = sources("qwen3_moe")

    def failing(rank: int) -> bool:
        with disturbed("replace", 4, disk_full) if rank == 0 else contextlib.nullcontext():
            return run(source, tmp_path / "out")

    refusals(together(2, tmp_path, failing))
    error = refusals(together(3, tmp_path, lambda rank: run(source, tmp_path / "out")))
    assert error.code == "E_CHANGED" and "calibration.processes" in str(error)
    with pytest.raises(QmoeError, match=r"calibration\.processes"):
        run(source, tmp_path / "out")


def test_processes_that_disagree_and_too_many_of_them_are_refused(sources, tmp_path):
    source = sources("qwen3_moe")

    def differing(rank: int) -> bool:
        return run(source, tmp_path / "out", source=np.roll(TOKENS, rank))

    error = refusals(together(2, tmp_path, differing))
    assert error.code == "E_CHANGED" and "calibration.sha256" in str(error) and "all processes" in str(error)
    error = refusals(together(3, tmp_path, lambda rank: run(source, tmp_path / "out", source=TOKENS[:40])))
    assert error.code == "E_VALUE" and "fewer" in str(error)

    def numbered(rank: int) -> Any:
        return compress(source, tmp_path / "out", RECIPE, calibration=spec_of(), device="cuda:0")

    assert refusals(together(2, tmp_path, numbered)).code == "E_VALUE"
    if not torch.cuda.is_available():
        missing = together(
            2, tmp_path, lambda rank: compress(source, tmp_path / "out", RECIPE, calibration=spec_of(), device="cuda")
        )
        assert refusals(missing).code == "E_NO_KERNEL"
    assert WINDOWS >= 3 and not (tmp_path / "out").exists()


def test_a_bug_in_one_process_ends_the_others_too(sources, tmp_path):
    source = sources("qwen3_moe")

    def bug() -> None:
        raise ZeroDivisionError("oops")

    def failing(rank: int) -> bool:
        with disturbed("pwrite", 2, bug) if rank == 1 else contextlib.nullcontext():
            return run(source, tmp_path / "out")

    other, own = together(2, tmp_path, failing)
    assert isinstance(own, ZeroDivisionError)
    assert isinstance(other, RuntimeError) and "process 1" in str(other) and "ZeroDivisionError: oops" in str(other)


def test_a_process_group_that_is_there_is_used_and_left_there(sources, tmp_path):
    import torch.distributed as dist

    source = sources("qwen3_moe")

    def inside(rank: int) -> list[bool]:
        dist.init_process_group("gloo")
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
        resumed = [run(source, tmp_path / name) for name in ("a", "b")]
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return [*resumed, int(total) == 2]

    assert together(2, tmp_path, inside) == [[False, False, True]] * 2
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **meeting(0, 0, 1), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        del environment[name]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}", "-m", "qmoe_core", *map(str, arguments)]
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def test_under_torchrun_the_first_process_speaks(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 200, 512))
    options = ["--calibration", tmp_path / "ids.npy", "--calibration-window", 64, "--format", "int2", "--group", 64]
    done = torchrun("compress", MODEL, "-o", tmp_path / "out", *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["calibration"]["processes"] == 2 and result["calibration"]["tokens"] == 512
    refused = torchrun("compress", MODEL, "-o", tmp_path / "out", *options[:-1], 32, "--json")
    assert refused.returncode != 0 and json.loads(refused.stdout)["error"]["code"] == "E_CHANGED"
    assert refused.stderr.count("qmoe: error: ") == 1 and re.search(r"exitcode\s*: 3 ", refused.stderr), refused.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_make_what_one_cpu_makes(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 200, 4096))
    options = ["--calibration", tmp_path / "ids.npy", "--calibration-window", 64, "--group", 64, "--drift", "--json"]
    reports = []
    for device in ("cpu", "cuda", "cuda"):
        output = tmp_path / f"{device}-{len(reports)}"
        done = torchrun("compress", MODEL, "-o", output, "--device", device, *options)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    assert hashes(tmp_path / "cuda-1") == hashes(tmp_path / "cuda-2")
    for cpu, cuda in zip(reports[0]["tensors"], reports[1]["tensors"], strict=True):
        assert cuda["relative_output_error"] == pytest.approx(cpu["relative_output_error"], rel=0.05)
    absent = torchrun("compress", MODEL, "-o", tmp_path / "out", "--device", "cuda:1", *options)
    assert json.loads(absent.stdout)["error"]["code"] == "E_VALUE"
