"""Durable writes, the journal, and every way in which a resume can be refused or continue."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from packed_fixtures import tiny_model
from safetensors.torch import load_file

import qmoe_core.checkpoint as checkpoint_module
from qmoe_core.checkpoint import compress
from qmoe_core.errors import QmoeError
from qmoe_core.journal import DIRECTORY, Journal
from qmoe_core.recipe import Recipe
from qmoe_core.store import ShardWriter, TensorPlan, crc32c, crc32c_joined, write_atomic

RECIPE = Recipe.uniform("int4", group=32)
SHARD = 12_000


class Stop(Exception):
    """Stands for whatever ends a run in the middle."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    tiny_model("qwen3_moe", num_hidden_layers=4).to(torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "out"
    compress(source, output, RECIPE, max_shard_bytes=SHARD)
    return contents(output)


def stop_after(events):
    """A progress callback that ends the run at the given event."""
    left = [events]

    def progress(event):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return progress


def interrupt(source, output, events, recipe=RECIPE, shard=SHARD):
    with pytest.raises(Stop):
        compress(source, output, recipe, max_shard_bytes=shard, progress=stop_after(events))
    assert (output / DIRECTORY / "job.json").exists() and not (output / "config.json").exists()


@pytest.fixture
def sync_always(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "SYNC_SECONDS", 0.0)


@pytest.mark.parametrize("events", [1, 2, 5, 11, 23])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_an_interrupted_job_continues_to_the_same_bytes(source, reference, tmp_path, monkeypatch, events, seconds):
    monkeypatch.setattr(checkpoint_module, "SYNC_SECONDS", seconds)
    interrupt(source, tmp_path / "out", events)
    report = compress(source, tmp_path / "out", RECIPE, max_shard_bytes=SHARD)
    assert report.resumed and contents(tmp_path / "out") == reference
    assert not (tmp_path / "out" / DIRECTORY).exists()


def test_finished_tensors_are_not_done_again(source, tmp_path, sync_always, monkeypatch):
    calls = []
    original = checkpoint_module.PackedTensor.pack
    monkeypatch.setattr(
        checkpoint_module.PackedTensor, "pack", classmethod(lambda cls, m: (calls.append(1), original(m))[1])
    )
    compress(source, tmp_path / "whole", RECIPE, max_shard_bytes=10**9)
    total, events = len(calls), []
    compress(source, tmp_path / "count", RECIPE, max_shard_bytes=10**9, progress=events.append)
    packed = [index for index, event in enumerate(events, 1) if event.detail.endswith("_qmoe")]
    calls.clear()
    interrupt(source, tmp_path / "out", packed[3], shard=10**9)  # in the middle of the only shard
    assert len(calls) == 4
    compress(source, tmp_path / "out", RECIPE, max_shard_bytes=10**9)
    assert len(calls) == total
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_torn_last_line_is_cut_off(source, reference, tmp_path, sync_always):
    interrupt(source, tmp_path / "out", 9)
    progress = tmp_path / "out" / DIRECTORY / "progress"
    data = progress.read_bytes()
    for torn in (data[:-1], data[:-20], data + b"deadbeef {", data[:-3] + b"#}\n"):
        shutil.copytree(tmp_path / "out", tmp_path / "torn")
        (tmp_path / "torn" / DIRECTORY / "progress").write_bytes(torn)
        compress(source, tmp_path / "torn", RECIPE, max_shard_bytes=SHARD)
        assert contents(tmp_path / "torn") == reference
        shutil.rmtree(tmp_path / "torn")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_lost_bytes_of_an_unfinished_shard_are_written_again(source, tmp_path, sync_always, damage):
    """After a power cut the journal may be there and the data not."""
    compress(source, tmp_path / "whole", RECIPE)
    interrupt(source, tmp_path / "out", 12, shard=4 << 30)
    (part,) = (tmp_path / "out" / DIRECTORY).glob("*.part")
    data = bytearray(part.read_bytes())
    if damage == "flip":
        data[-5] ^= 0x40
        part.write_bytes(data)
    elif damage == "truncate":
        part.write_bytes(data[: len(data) // 2])
    else:
        part.unlink()
    compress(source, tmp_path / "out", RECIPE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def changed(code, *arguments, **settings):
    with pytest.raises(QmoeError) as error:
        compress(*arguments, **settings)
    assert error.value.code == code, error.value
    return error.value


def copy_of(source, target):
    shutil.copytree(source, target, copy_function=shutil.copy2)
    return target


def edit_weight(directory):
    """Changes one byte in the middle of the weights, size kept."""
    path = directory / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - 1001)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_e_changed_source_options_and_version(source, tmp_path, monkeypatch):
    directory = copy_of(source, tmp_path / "in")
    output = tmp_path / "out"
    interrupt(directory, output, 6)
    before = contents(output)
    for recipe in (Recipe.uniform("int4", group=64), Recipe.uniform("int3", group=32), Recipe.uniform("ternary")):
        assert "recipe" in changed("E_CHANGED", directory, output, recipe, max_shard_bytes=SHARD).message
    assert "max_shard_bytes" in changed("E_CHANGED", directory, output, RECIPE, max_shard_bytes=SHARD + 1).message
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "__version__", "9.9.9")
        assert "library" in changed("E_CHANGED", directory, output, RECIPE, max_shard_bytes=SHARD).message
    tokenizer = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text("{}")
    assert "tokenizer" in changed("E_CHANGED", directory, output, RECIPE, max_shard_bytes=SHARD).message
    (directory / "tokenizer.json").write_text(tokenizer)
    edit_weight(directory)
    assert "model.safetensors" in changed("E_CHANGED", directory, output, RECIPE, max_shard_bytes=SHARD).message
    assert contents(output) == before


def test_e_changed_first_bytes_of_a_tensor_with_the_old_time(source, tmp_path):
    directory = copy_of(source, tmp_path / "in")
    interrupt(directory, tmp_path / "out", 6)
    path = directory / "model.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + 4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed("E_CHANGED", directory, tmp_path / "out", RECIPE, max_shard_bytes=SHARD)


def test_e_changed_finished_output_of_another_recipe(source, tmp_path):
    compress(source, tmp_path / "out", RECIPE)
    before = contents(tmp_path / "out")
    changed("E_CHANGED", source, tmp_path / "out", Recipe.uniform("int8"))
    assert contents(tmp_path / "out") == before


def test_a_finished_output_that_lost_bytes_is_reported(source, tmp_path):
    compress(source, tmp_path / "out", RECIPE)
    os.truncate(tmp_path / "out" / "model.safetensors", 100)
    changed("E_TRUNCATED", source, tmp_path / "out", RECIPE)


def test_e_corrupt_job_description(source, tmp_path):
    interrupt(source, tmp_path / "out", 3)
    (tmp_path / "out" / DIRECTORY / "job.json").write_text("{")
    changed("E_CORRUPT", source, tmp_path / "out", RECIPE, max_shard_bytes=SHARD)


HOLD = """
import sys, pathlib
from qmoe_core.journal import Journal
with Journal(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_e_busy_while_another_process_writes_and_free_when_it_is_killed(source, reference, tmp_path):
    output = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        changed("E_BUSY", source, output, RECIPE, max_shard_bytes=SHARD)
        child.kill()
        child.wait()
    finally:
        child.kill()
        child.communicate()
    compress(source, output, RECIPE, max_shard_bytes=SHARD)
    assert contents(output) == reference


def test_e_busy_within_one_process(tmp_path):
    with Journal(tmp_path / "out"), pytest.raises(QmoeError) as error:
        Journal(tmp_path / "out")
    assert error.value.code == "E_BUSY"
    Journal(tmp_path / "out").close()


def test_temporary_files_of_a_killed_writer_are_removed(source, reference, tmp_path):
    interrupt(source, tmp_path / "out", 6)
    (tmp_path / "out" / "qmoe.json.qmoe-tmp").write_text("half")
    (tmp_path / "out" / DIRECTORY / "job.json.qmoe-tmp").write_text("half")
    compress(source, tmp_path / "out", RECIPE, max_shard_bytes=SHARD)
    assert contents(tmp_path / "out") == reference


# store.py


def test_write_atomic_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "file"
    assert write_atomic(path, b"old") == 3
    assert write_atomic(path, iter([b"ne", b"w"])) == 3 and path.read_bytes() == b"new"

    def pieces():
        yield b"half"
        raise Stop

    with pytest.raises(Stop):
        write_atomic(path, pieces())
    for number, code in ((errno.ENOSPC, "E_NO_SPACE"), (errno.EDQUOT, "E_NO_SPACE"), (errno.EIO, "E_IO")):

        def failing(*_, number=number):
            raise OSError(number, os.strerror(number))

        for name in ("write", "fsync", "replace"):
            with monkeypatch.context() as patch, pytest.raises(QmoeError) as error:
                patch.setattr(os, name, failing)
                write_atomic(path, b"newer")
            assert error.value.code == code and error.value.file is not None
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"new"


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[: max(1, len(data) // 3)]))
    data = bytes(range(256)) * 40
    write_atomic(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_shard_writer_makes_files_that_safetensors_reads(tmp_path):
    plans = [TensorPlan("f32", "F32", (2, 3), 24), TensorPlan("ü", "U8", None, 10), TensorPlan("b", "U8", None, 5)]
    values = np.arange(6, dtype=np.float32)
    writer = ShardWriter(tmp_path / "x.part", plans)
    writer.write(values[:3].tobytes())
    writer.write(values[3:].data)
    assert writer.end_tensor() == 24
    writer.write(b"1234567")
    writer.sync()
    assert writer.end_tensor() == 7
    writer.write(b"")
    assert writer.end_tensor() == 0
    size = writer.finish(tmp_path / "x.safetensors")
    assert size == (tmp_path / "x.safetensors").stat().st_size and not (tmp_path / "x.part").exists()
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["f32"].tolist() == [[0, 1, 2], [3, 4, 5]] and bytes(tensors["ü"].tolist()) == b"1234567"
    assert tensors["b"].shape == (0,)


def test_a_copied_tensor_of_the_wrong_size_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "x.part", [TensorPlan("a", "F32", (2,), 8)])
    writer.write(b"1234")
    with pytest.raises(QmoeError) as error:
        writer.end_tensor()
    writer.close()
    assert error.value.code == "E_SHAPE"


def test_journal_steps_survive_and_rewind(tmp_path):
    with Journal(tmp_path / "out") as journal:
        assert not journal.begin({"job": 1})
        for number in range(5):
            journal.note({"n": number})
        journal.commit()
        journal.note({"n": 5})  # never committed
    with Journal(tmp_path / "out") as journal:
        assert journal.begin({"job": 1}) and [step["n"] for step in journal.steps] == [0, 1, 2, 3, 4]
        journal.rewind(2)
        journal.note({"n": 9})
        journal.commit()
    with Journal(tmp_path / "out") as journal:
        journal.begin({"job": 1})
        assert [step["n"] for step in journal.steps] == [0, 1, 9]
        journal.remove()
    assert os.listdir(tmp_path / "out") == []


def test_progress_lines_carry_their_checksum(tmp_path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"job": 1})
        journal.note({"n": 0})
        journal.commit()
        line = (journal.path / "progress").read_bytes()
    crc, _, body = line.rstrip(b"\n").partition(b" ")
    assert json.loads(body) == {"n": 0} and int(crc, 16) == crc32c(body)


def test_checksums_of_parts_join_to_that_of_the_whole():
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8)
    for cut in (0, 1, 17, 65_536, 70_000):
        first, second = crc32c(data[:cut]), crc32c(data[cut:])
        assert crc32c_joined(first, second, len(data) - cut) == crc32c(data)
    assert crc32c_joined(crc32c(data[:9]), crc32c(data[9:]), 8) != crc32c(data)
