"""Compression of whole checkpoints: what is in the output, honest sizes, refusals."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from packed_fixtures import FAMILIES, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qmoe_core
from qmoe_core.checkpoint import compress, load_report, read_qmoe_json
from qmoe_core.errors import QmoeError
from qmoe_core.families import analyze
from qmoe_core.formats import PackedTensor
from qmoe_core.quantize import quantize
from qmoe_core.recipe import Recipe, Rule
from qmoe_core.report import MemoryMeter
from qmoe_core.source import SourceCheckpoint
from qmoe_core.store import crc32c


def output_tensors(directory) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).to(torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "training_args.bin").write_bytes(b"never opened")
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    tiny_model("qwen3_moe", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


RECIPES = {
    "int4": Recipe.uniform("int4", group=32),
    "ternary": Recipe.uniform("ternary"),
    "mixed": Recipe(
        (
            Rule.make(format="int8", match="*.[dw]o*"),
            Rule.make(format="int2", method="finequant"),
            Rule.make(format="int3", role=["attention"], method="rtn", group=0),
        )
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_packed_records_are_the_quantized_weights_and_everything_else_is_unchanged(source, tmp_path, name):
    recipe, output = RECIPES[name], tmp_path / "out"
    report = compress(source, output, recipe)
    tensors, original = output_tensors(output), load_file(source / "model.safetensors")
    entries = {entry.name: entry for entry in report.tensors}
    consumed = set()
    with SourceCheckpoint(source) as checkpoint:
        layout = analyze(source, {n: t.shape for n, t in checkpoint.tensors.items()})
        for target in layout.targets:
            decision = recipe.choose(target.name, target.role)
            if decision is None:
                assert target.packed_name not in tensors
                continue
            consumed.update(target.source_names)
            packed = PackedTensor(tensors.pop(target.packed_name).numpy())
            packed.verify()
            assert (packed.experts, packed.rows, packed.cols) == target.shape
            for expert, weight in enumerate(target.matrices(checkpoint.read)):
                matrix, _ = quantize(weight, decision[1])
                np.testing.assert_array_equal(packed.decode(expert), matrix.dequantize())
            entry = entries.pop(target.packed_name)
            assert entry.crc32c == crc32c(packed.data) and entry.nbytes == packed.nbytes
            for part, crc in entry.sources.items():
                assert crc == crc32c(original[part].flatten().view(torch.uint8).numpy())
    assert consumed and not entries
    assert tensors.keys() == original.keys() - consumed
    for tensor_name, tensor in tensors.items():
        assert tensor.dtype == original[tensor_name].dtype and torch.equal(tensor, original[tensor_name])


def test_the_directory_is_what_the_report_says(source, tmp_path):
    output = tmp_path / "out"
    report = compress(source, output, RECIPES["int4"])
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(output)}
    assert report.files == sizes and report.bytes_on_disk == sum(sizes.values())
    du = subprocess.run(["du", "-b", *sorted(sizes)], cwd=output, capture_output=True, text=True, check=True).stdout
    assert sum(int(line.split()[0]) for line in du.splitlines()) == report.bytes_on_disk
    parameters = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert report.original_parameters == parameters
    assert report.bits_per_parameter == sum(sizes.values()) * 8 / parameters
    assert {"config.json", "qmoe.json", "tokenizer.json", "model.safetensors"} <= sizes.keys()
    assert not {"training_args.bin", ".qmoe-journal"} & sizes.keys()
    assert json.loads((output / "qmoe.json").read_text())["totals"]["bytes_on_disk"] == report.bytes_on_disk


def test_config_keeps_the_original_and_describes_every_packed_tensor(source, tmp_path):
    report = compress(source, tmp_path / "out", RECIPES["mixed"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert (quantization["quant_method"], quantization["version"]) == ("qmoe", 1)
    described = {
        f"{module}.{name}_qmoe": (entry["kind"], tensor["shape"], tensor["nbytes"])
        for module, entry in quantization["packed"].items()
        for name, tensor in entry["tensors"].items()
    }
    assert described == {t.name: (t.kind, list(t.shape), t.nbytes) for t in report.tensors}


def test_shards_keep_tensors_aligned_and_the_index_complete(qwen, tmp_path):
    report = compress(qwen, tmp_path / "out", RECIPES["mixed"], max_shard_bytes=30_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert [path.name for path in shards] == names
    assert len(shards) > 2
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for path in shards:
        with qmoe_core._C.SafetensorsFile(path) as file:
            assert {name for name, shard in weight_map.items() if shard == path.name} == file.tensors.keys()
            for dtype, _, begin, _ in file.tensors.values():
                assert begin % {"BF16": 2, "F32": 4, "U8": 1}[dtype] == 0
    assert {t.name: t.file for t in report.tensors}.items() <= weight_map.items()
    whole = compress(qwen, tmp_path / "whole", RECIPES["mixed"])
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert [t.crc32c for t in whole.tensors] == [t.crc32c for t in report.tensors]


def test_the_same_input_gives_the_same_bytes_and_a_finished_output_is_recognised(qwen, tmp_path):
    first = compress(qwen, tmp_path / "a", RECIPES["mixed"])
    compress(qwen, tmp_path / "b", RECIPES["mixed"])
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()}
    assert {name: data for name, (data, _) in before.items()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    again = compress(qwen, tmp_path / "a", RECIPES["mixed"])
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()} == before
    assert again.resumed and again.tensors == first.tensors and again.bytes_on_disk == first.bytes_on_disk
    assert load_report(tmp_path / "a").tensors == first.tensors


def test_progress_reaches_the_total_in_order(qwen, tmp_path):
    events = []
    compress(qwen, tmp_path / "out", RECIPES["int4"], progress=events.append)
    done = [event.done for event in events]
    total = sum(path.stat().st_size for path in qwen.glob("*.safetensors"))
    assert done == sorted(done) and done[-1] == events[-1].total <= total
    assert {event.stage for event in events} == {"compress", "finish"}


def test_the_report_serialises(qwen, tmp_path):
    report = compress(qwen, tmp_path / "out", RECIPES["int4"])
    data = json.loads(json.dumps(report.to_dict()))
    assert data["bits_per_parameter"] == report.bits_per_parameter and len(data["tensors"]) == len(report.tensors)
    assert data["peak_rss_bytes"] > 0 and data["tensors"][0]["format"] == "int4-g32"
    assert 4.0 < report.expert_bits_per_weight < 8.0  # rows of 24 and 40: mostly metadata


MEASURE = """
import json, sys, torch
from qmoe_core.checkpoint import compress
from qmoe_core.recipe import Recipe
first = compress(sys.argv[1], sys.argv[3], Recipe.uniform("int4"))
again = compress(sys.argv[2], sys.argv[4], Recipe.uniform("int4"))
print(json.dumps([[r.peak_rss_bytes - r.start_rss_bytes, r.rss_limit_bytes, r.original_bytes, r.largest_layer_bytes]
                  for r in (first, again)]))
"""


def test_memory_stays_under_the_promise_and_does_not_grow_with_the_model(tmp_path):
    for name, layers in (("short", 1), ("long", 12)):
        sizes = {"num_hidden_layers": layers, "hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8}
        tiny_model("qwen3_moe", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / name)
    places = [tmp_path / name for name in ("short", "long", "out-short", "out-long")]
    result = subprocess.run([sys.executable, "-c", MEASURE, *places], capture_output=True, text=True, check=True)
    first, again = json.loads(result.stdout)
    for added, limit, original, layer in (first, again):
        assert added <= limit == 2 * layer + (512 << 20)
        assert layer < original
    # In the second run nothing is left to import, so that what it adds is what the work needs.
    added, _, original, layer = again
    assert original > 11 * layer and added <= 6 * layer, (added, layer)


def test_the_memory_meter_sees_a_peak_that_is_over():
    meter = MemoryMeter()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages: the allocator might hand out resident ones
        block.write(b"x" * len(block))
    assert meter.peak() - meter.start >= 60 << 20


# Refusals.


def refused(code, *arguments, **settings):
    with pytest.raises(QmoeError) as error:
        compress(*arguments, **settings)
    assert error.value.code == code, error.value
    return error.value


def test_e_same_file(qwen, tmp_path):
    recipe = RECIPES["int4"]
    for output in (qwen, qwen / "nested", qwen.parent, qwen / ".." / qwen.name):
        refused("E_SAME_FILE", qwen, output, recipe)
    (tmp_path / "link").symlink_to(qwen)
    refused("E_SAME_FILE", qwen, tmp_path / "link", recipe)
    refused("E_SAME_FILE", tmp_path / "link", qwen, recipe)
    refused("E_SAME_FILE", qwen, tmp_path / "link" / "nested", recipe)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").symlink_to(next(qwen.glob("*.safetensors")))
    refused("E_SAME_FILE", qwen, tmp_path / "out", recipe)
    assert not (qwen / "nested").exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".pth", ".ckpt"])
def test_e_unsafe_source(qwen, tmp_path, suffix):
    recipe, pickled = RECIPES["int4"], tmp_path / f"pytorch_model{suffix}"
    pickled.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused("E_UNSAFE_SOURCE", pickled, tmp_path / "out", recipe)
    (tmp_path / "in").mkdir()
    shutil.copy(pickled, tmp_path / "in")
    shutil.copy(qwen / "config.json", tmp_path / "in")
    refused("E_UNSAFE_SOURCE", tmp_path / "in", tmp_path / "out", recipe)
    index = {"weight_map": {"a": pickled.name}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("E_UNSAFE_SOURCE", tmp_path / "in", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


def test_e_missing(qwen, tmp_path):
    recipe = RECIPES["int4"]
    refused("E_MISSING", tmp_path / "nowhere", tmp_path / "out", recipe)
    (tmp_path / "empty").mkdir()
    refused("E_MISSING", tmp_path / "empty", tmp_path / "out", recipe)
    directory = copy_of(qwen, tmp_path / "in")
    (directory / "config.json").unlink()
    refused("E_MISSING", directory, tmp_path / "out", recipe)
    shutil.copy(qwen / "config.json", directory)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.layers.7.absent"] = next(iter(index["weight_map"].values()))
    index_path.write_text(json.dumps(index))
    assert refused("E_MISSING", directory, tmp_path / "out", recipe).tensor == "model.layers.7.absent"
    index_path.write_text((qwen / index_path.name).read_text())
    next(directory.glob("*-00002-*")).unlink()
    refused("E_MISSING", directory, tmp_path / "out", recipe)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.txt"])
def test_e_name_for_an_index_that_leads_elsewhere(qwen, tmp_path, name):
    directory = copy_of(qwen, tmp_path / "in")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused("E_NAME", directory, tmp_path / "out", RECIPES["int4"])


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_e_corrupt_index(qwen, tmp_path, text):
    directory = copy_of(qwen, tmp_path / "in")
    (directory / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    refused("E_CORRUPT", directory, tmp_path / "out", RECIPES["int4"])


def test_a_truncated_source_is_refused_by_the_parser(qwen, tmp_path):
    directory = copy_of(qwen, tmp_path / "in")
    shard = next(directory.glob("*-00002-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    assert refused("E_TRUNCATED", directory, tmp_path / "out", RECIPES["int4"]).file == str(shard)


@pytest.mark.parametrize(("value", "code"), [(float("nan"), "E_VALUE"), (float("inf"), "E_VALUE")])
def test_non_finite_weights_name_the_tensor_and_leave_nothing_loadable(tmp_path, value, code):
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = value
    model.save_pretrained(tmp_path / "in")
    error = refused(code, tmp_path / "in", tmp_path / "out", RECIPES["int4"])
    assert error.tensor == "model.layers.1.mlp.experts.down_proj[3]"
    assert not (tmp_path / "out" / "config.json").exists()


def test_integer_experts_are_refused(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    assert refused("E_DTYPE", tmp_path / "in", tmp_path / "out", RECIPES["int4"]).tensor == name


def test_foreign_outputs_are_refused(qwen, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    refused("E_VALUE", qwen, tmp_path / "out", RECIPES["int4"])
    (tmp_path / "file").write_text("")
    refused("E_VALUE", qwen, tmp_path / "file", RECIPES["int4"])
    refused("E_VALUE", qwen, tmp_path / "other", RECIPES["int4"], max_shard_bytes=0)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_a_recipe_that_matches_nothing_leaves_no_output(qwen, tmp_path):
    refused("E_VALUE", qwen, tmp_path / "out", Recipe.uniform("int4", role="shared_expert"))
    assert not (tmp_path / "out").exists()


def test_reading_qmoe_json_of_something_else(qwen, tmp_path):
    for text, code in (
        (None, "E_MISSING"),
        ("{", "E_CORRUPT"),
        ('{"version": 99}', "E_VERSION"),
        ('{"version": 1}', "E_CORRUPT"),
    ):
        if text is not None:
            (tmp_path / "qmoe.json").write_text(text)
        with pytest.raises(QmoeError) as error:
            read_qmoe_json(tmp_path)
        assert error.value.code == code
