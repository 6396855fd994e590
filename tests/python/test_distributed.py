"""Calibrated compression by several processes: the same result as by one, the same errors on all of them, no hangs."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_fixtures import tiny_model
from safetensors.torch import load_file

import qmoe_core.quantize as methods
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.calibration.distributed import Message, parts, rounds, unpack
from qmoe_core.checkpoint import compress, read_qmoe_json
from qmoe_core.formats import IntFormat, PackedTensor
from qmoe_core.recipe import Recipe
from qmoe_core.verification import verify

WINDOW, WINDOWS = 16, 7
TOKENS = np.random.default_rng(0).integers(3, 96, WINDOW * WINDOWS)
ROLES = ["expert", "attention"]
RECIPE = Recipe.uniform("int4", 32, "gptq", role=ROLES)


def spec_of(**changes: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"source": TOKENS, "window": WINDOW, "batch_size": 2, "chunk_bytes": 120_000, **changes})


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def meeting(port: int, rank: int, size: int) -> dict[str, str]:
    """The environment that torchrun would give a process, on loopback only."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def together(size: int, folder: Path, work: Callable[[int], Any], limit: float = 90.0) -> list[Any]:
    """Runs `work(rank)` in `size` forked processes; by rank what it returned or raised, or the signal that ended it."""
    port, children = free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(meeting(port, rank, size))
            torch.set_num_threads(1)
            try:
                outcome = work(rank)
            except BaseException as error:
                outcome = error
            (folder / f"outcome-{rank}").write_bytes(pickle.dumps(outcome))
            os._exit(0)
        children.append(pid)
    outcomes, end = [], time.monotonic() + limit
    for rank, pid in enumerate(children):
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.02)
        if ended == (0, 0):
            for child in children[rank:]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            pytest.fail(f"process {rank} hangs")
        file = folder / f"outcome-{rank}"
        outcomes.append(os.WTERMSIG(ended[1]) if os.WIFSIGNALED(ended[1]) else pickle.loads(file.read_bytes()))
        file.unlink(missing_ok=True)
    return outcomes


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def probe(monkeypatch):
    """A calibrated method "probe" that rounds to nearest, whatever the statistics, and notes them by tensor."""
    calls: dict[str, list] = {}
    real = methods.quantize_stack

    def round_all(weights, statistics, spec):
        return [methods.quantize(w, methods.MethodSpec("rtn", spec.format)) for w in weights]

    def quantize_stack(weights, statistics, spec, *, tensor=None):
        calls.setdefault(tensor, []).append(statistics)
        return real(weights, statistics, spec, tensor=tensor)

    info = methods.MethodInfo(IntFormat, frozenset(), quantize_stack=round_all, weighs_rows=(IntFormat,))
    monkeypatch.setitem(methods.METHODS, "probe", info)
    monkeypatch.setattr(methods, "quantize_stack", quantize_stack)
    return calls


def stacked(calls: list, name: str) -> torch.Tensor:
    return torch.cat([getattr(statistics, name) for statistics in calls])


def weights(directory: Path) -> dict[str, np.ndarray]:
    tensors = load_file(directory / "model.safetensors")
    result = {}
    for name in read_qmoe_json(directory)["packed"]:
        packed = PackedTensor(tensors[name].numpy())
        result[name] = np.stack([packed.decode(expert) for expert in range(packed.experts)])
    return result


def test_parts_cover_everything_evenly():
    for length in (0, 1, 5, 64):
        for count in (1, 2, 3, 8):
            found = parts(range(10, 10 + length), count)
            assert [i for part in found for i in part] == list(range(10, 10 + length)) and len(found) == count
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_every_process_gets_a_chunk_while_there_are_enough():
    for experts, chunk, size in [(5, 3, 2), (5, 3, 3), (8, 1, 3), (128, 7, 8), (4, 100, 1), (1, 1, 4)]:
        found = rounds(experts, chunk, size)
        assert [e for work in found for share in work.shares for e in share] == list(range(experts))
        for work in found:
            assert len(work.shares) == size and list(work.experts) == [e for share in work.shares for e in share]
            if not work.divided:
                assert max(map(len, work.shares)) <= chunk
        whole = [len(share) for work in found if not work.divided for share in work.shares]
        assert not whole or max(whole) - min(whole) <= 1
    assert [work.divided for work in rounds(10, 2, 2)] == [False, False, True]
    assert [work.shares for work in rounds(5, 9, 1)] == [[range(5)]]


@pytest.mark.parametrize(("family", "size"), [("qwen3_moe", 2), ("qwen3_moe", 3), ("gpt_oss", 2), ("deepseek_v3", 3)])
def test_every_process_owns_sums_over_the_tokens_of_all(family, size, sources, probe, tmp_path):
    source = sources(family)
    recipe = Recipe.uniform("int3", 32, "probe", role=["expert", "attention", "shared_expert"])

    def run(output: Path) -> dict[str, list]:
        probe.clear()
        compress(source, output, recipe, calibration=spec_of(drift=True, gate_weighted=size == 3))
        return dict(probe)

    expected = run(tmp_path / "one")
    outcomes = together(size, tmp_path, lambda rank: run(tmp_path / "several"))
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    assert sorted(name for outcome in outcomes for name in outcome if "self_attn" in name) == sorted(
        name for name in expected if "self_attn" in name
    )
    for name, statistics in expected.items():
        chunks = [outcome.get(name, []) for outcome in outcomes]
        found = by_expert(statistics, chunks)
        for part in ("tokens", "hessian", "drift", "row_importance"):
            if getattr(statistics[0], part) is not None:
                a, b = stacked(statistics, part).double(), stacked(found, part).double()
                scale = float(a.abs().max()) or 1.0
                assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-6 * scale, (name, part)
        for one, several in zip(statistics, by_chunk(statistics, chunks), strict=True):
            for other in several if one.pooled is not None else ():
                assert other.pooled_tokens == one.pooled_tokens
                scale = float(one.pooled.abs().max())
                torch.testing.assert_close(other.pooled, one.pooled, rtol=0, atol=1e-6 * scale)
    one, several = (read_qmoe_json(tmp_path / name)["packed"] for name in ("one", "several"))
    for part in ("crc32c", "sources"):  # no weight depends on the statistics: the records are equal to the last bit
        assert {name: entry[part] for name, entry in one.items()} == {
            name: entry[part] for name, entry in several.items()
        }


@pytest.mark.parametrize("format", ["int4", "ternary"])
def test_weights_are_those_of_one_process_but_for_ties(format, sources, tmp_path):
    torch.set_num_threads(1)
    source, recipe = sources("qwen3_moe"), Recipe.uniform(format, method="gptq", role=ROLES)

    def run(output: Path, **changes: Any):
        report = compress(source, output, recipe, calibration=spec_of(**changes))
        return report.to_dict(), report.resumed

    single, _ = run(tmp_path / "one")
    outcomes = together(2, tmp_path, lambda rank: run(tmp_path / "several"))
    assert [outcome[1] for outcome in outcomes] == [False, False]
    assert outcomes[0][0]["tensors"] == outcomes[1][0]["tensors"]
    assert outcomes[0][0]["calibration"] == {**single["calibration"], "processes": 2}
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    close = [np.mean(np.isclose(one[name], several[name], rtol=2e-3, atol=1e-6)) for name in one]
    assert np.mean(close) > 0.99, close
    for a, b in zip(single["tensors"], outcomes[0][0]["tensors"], strict=True):
        assert a["calibration"]["tokens"] == b["calibration"]["tokens"]
        assert a["relative_output_error"] == pytest.approx(b["relative_output_error"], rel=0.05)
    assert verify(tmp_path / "several").ok and not (tmp_path / "several" / ".qmoe-journal").exists()
    together(2, tmp_path, lambda rank: run(tmp_path / "again", buffer_bytes=0))  # wherever activations are kept
    assert hashes(tmp_path / "again") == hashes(tmp_path / "several")
    assert [outcome[1] for outcome in together(2, tmp_path, lambda rank: run(tmp_path / "again"))] == [True, True]


def by_chunk(single: list, processes: list[list]) -> list[list]:
    """For every chunk what the processes were given of it, in the order of the experts."""
    left, result = [list(calls) for calls in processes], []
    if len(single) == 1 and len(single[0].tokens) == 1:  # a linear layer
        return [[calls.pop(0) for calls in left if calls]]
    for work in rounds(sum(len(s.tokens) for s in single), max(len(s.tokens) for s in single), len(processes)):
        given = [left[rank].pop(0) for rank, share in enumerate(work.shares) if len(share)]
        result += [given] if work.divided else [[statistics] for statistics in given]
    assert not any(left)
    return result


def by_expert(single: list, processes: list[list]) -> list:
    """The statistics of all processes in the order of the experts."""
    return [statistics for several in by_chunk(single, processes) for statistics in several]


@pytest.mark.parametrize("value", [None, [], ["x", np.arange(7), np.zeros(0)], {"a": np.arange(24.0).reshape(2, 12).T}])
def test_messages_hold_what_was_put_in(value):
    message = Message(value)
    data = message.tensor(message.nbytes + 100)[: message.nbytes]
    found = unpack(data)
    assert repr(found) == repr(value)
    for array in found if isinstance(found, list) else ():
        assert not isinstance(array, np.ndarray) or (array.flags.writeable and array.ctypes.data % 16 == 0)
