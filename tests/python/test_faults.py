"""Jobs that are killed, and jobs whose file operations fail: nothing is lost and every resume ends with the same bytes.

QMOE_KILL_POINTS=200 python -m pytest tests/python/test_faults.py   for the record; the default is a sample.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packed_fixtures import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "novels-moe"
JOBS = ROOT / "tests" / "faults" / "jobs.py"


def run_jobs(kind: str, work: Path, points: int, *options: str, model: Path = MODEL, **environment: str) -> dict:
    """Runs tests/faults/jobs.py and returns what it printed."""
    result = subprocess.run(
        [sys.executable, str(JOBS), kind, str(model), str(work), "--points", str(points), *options],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def test_killed_at_any_moment_the_same_command_continues_to_the_same_bytes(tmp_path):
    points = int(os.environ.get("QMOE_KILL_POINTS", "12"))
    result = run_jobs("kill", tmp_path, points)
    assert result["problems"] == []
    assert result["counts"]["killed"] >= points
    assert result["counts"]["left to resume"] >= points / 4


def test_killed_while_measuring_planning_or_calibrating_likewise(tmp_path):
    """A calibrated compression within a budget: losses, plan, layers and shards, all in the journal."""
    points = int(os.environ.get("QMOE_KILL_POINTS", "12"))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    result = run_jobs("kill", tmp_path / "work", points, "--bits", "19", model=tmp_path / "model")
    assert result["problems"] == []
    assert result["counts"]["killed"] >= points
    assert result["counts"]["left to resume"] >= points / 4


def test_pruning_killed_at_any_moment_likewise(tmp_path):
    points = int(os.environ.get("QMOE_KILL_POINTS", "12"))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    result = run_jobs("kill", tmp_path / "work", points, "--prune", model=tmp_path / "model")
    assert result["problems"] == []
    assert result["counts"]["killed"] >= points
    assert result["counts"]["left to resume"] >= points / 4


@pytest.fixture(scope="module")
def failio(tmp_path_factory):
    """The LD_PRELOAD library that makes file operations fail."""
    library = tmp_path_factory.mktemp("failio") / "failio.so"
    source = ROOT / "tests" / "faults" / "failio.c"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", library, source, "-ldl"], check=True)
    return library


def test_failing_file_operations_are_typed_and_leave_everything_intact(failio, tmp_path):
    """ENOSPC (once and for good), EIO and short writes at the k-th operation. QMOE_FAULT_POINTS=0 tries every k."""
    points = int(os.environ.get("QMOE_FAULT_POINTS", "12"))
    result = run_jobs("io", tmp_path, points, LD_PRELOAD=str(failio))
    assert result["problems"] == []
    assert result["counts"].pop("operations") > 100
    done = sum(result["counts"].values())
    assert done == points or points == 0
    refusals = {name.split()[-1] for name in result["counts"] if "refused" in name}
    assert refusals == {"E_NO_SPACE", "E_IO"}


def test_failing_file_operations_of_pruning_likewise(failio, tmp_path):
    points = int(os.environ.get("QMOE_FAULT_POINTS", "12"))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    result = run_jobs("io", tmp_path / "work", points, "--prune", model=tmp_path / "model", LD_PRELOAD=str(failio))
    assert result["problems"] == []
    assert result["counts"].pop("operations") > 50
    refusals = {name.split()[-1] for name in result["counts"] if "refused" in name}
    assert refusals == {"E_NO_SPACE", "E_IO"}
