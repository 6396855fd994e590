"""The commands: what they print, as text and as JSON, and what their exit codes say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from qmoe_core import QmoeError
from qmoe_core.cli.app import Method, ScaleType, app
from qmoe_core.cli.output import EXIT_HELP, ExitCode
from qmoe_core.errors import CODES
from qmoe_core.formats import SCALE_DTYPES
from qmoe_core.journal import Journal
from qmoe_core.quantize import METHODS
from qmoe_core.quickstart import example_directory

MODEL = example_directory()
TEXT = MODEL / "text" / "held_out.txt"


def qmoe(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def qmoe_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """Runs with --json; stdout must be one JSON object and nothing else."""
    result = qmoe(*arguments, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def refusal(*arguments: object, code: ExitCode = ExitCode.REFUSED) -> str:
    """Runs a command that must fail with `code`, on one line and without traceback; returns the error's code."""
    result = qmoe(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("qmoe: error: ")
    assert "Traceback" not in result.stderr
    value = qmoe_json(*arguments, code=code)
    assert value["exit_code"] == code
    error: str = value["error"]["code"]
    assert error in result.stderr or error not in CODES
    return error


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 4 bits. Read only."""
    output = tmp_path_factory.mktemp("cli") / "int4"
    assert qmoe("compress", MODEL, "-o", output, "--format", "int4", "--group", "128").exit_code == 0
    return output


@pytest.fixture
def damaged(compressed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(compressed, tmp_path / "damaged"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# compress


def test_compress_reports_what_is_on_the_disk(tmp_path: Path) -> None:
    report = qmoe_json("compress", MODEL, "-o", tmp_path / "out", "--format", "int4", "--group", "128")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert report["bytes_on_disk"] == on_disk
    assert report["bits_per_parameter"] == pytest.approx(on_disk * 8 / 2_299_264)
    assert report["expert_weights"] == 1_572_864
    assert 4.0 < report["expert_bits_per_weight"] <= 4.30
    assert {entry["format"] for entry in report["tensors"]} == {"int4-g128"}


def test_compress_for_people_names_the_sizes(tmp_path: Path) -> None:
    result = qmoe("compress", MODEL, "-o", tmp_path / "out", "--format", "int8")
    assert result.exit_code == 0
    for text in ("bits per parameter", "bits per expert weight", "peak memory", str(tmp_path / "out")):
        assert text in result.stdout


def test_compress_options_reach_the_recipe(tmp_path: Path) -> None:
    report = qmoe_json("compress", MODEL, "-o", tmp_path / "a", "--format", "int3", "--group", "64", "--symmetric")
    assert {entry["format"] for entry in report["tensors"]} == {"int3-g64-sym"}
    wide = ("--format", "int3", "--group", "64", "--symmetric", "--scale-dtype", "float32")
    wider = qmoe_json("compress", MODEL, "-o", tmp_path / "wide", *wide)
    assert wider["expert_bits_per_weight"] == pytest.approx(report["expert_bits_per_weight"] + 16 / 64, abs=1e-3)
    report = qmoe_json("compress", MODEL, "-o", tmp_path / "b", "--method", "ternary-minmax", "--symmetric")
    assert {(entry["format"], entry["method"]) for entry in report["tensors"]} == {("ternary-sym", "ternary-minmax")}


def test_compress_takes_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*layers.0.*"\nformat = "int8"\n[[rule]]\nformat = "int2"\ngroup = 64\n')
    report = qmoe_json("compress", MODEL, "-o", tmp_path / "out", "--recipe", recipe)
    formats = {entry["name"].split(".")[2]: entry["format"] for entry in report["tensors"]}
    assert formats == {"0": "int8-g128", "1": "int2-g64", "2": "int2-g64", "3": "int2-g64"}


def test_compress_again_changes_nothing(damaged: Path) -> None:
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    assert qmoe_json("compress", MODEL, "-o", damaged, "--format", "int4", "--group", "128")["resumed"] is True
    assert {file.name: file.read_bytes() for file in damaged.iterdir()} == before


def test_compress_refuses_another_job_in_the_same_place(damaged: Path) -> None:
    before = {path: path.read_bytes() for path in damaged.iterdir()}
    assert refusal("compress", MODEL, "-o", damaged, "--format", "int8") == "E_CHANGED"
    assert {path: path.read_bytes() for path in damaged.iterdir()} == before


def test_compress_refuses_its_own_source(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MODEL, tmp_path / "source"))
    assert refusal("compress", source, "-o", source) == "E_SAME_FILE"
    assert refusal("compress", source, "-o", source / "inside") == "E_SAME_FILE"


def test_compress_refuses_pickle(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MODEL / "config.json", source)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert refusal("compress", source, "-o", tmp_path / "out") == "E_UNSAFE_SOURCE"
    assert not (tmp_path / "out" / "config.json").exists()


def test_compress_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert refusal("compress", tmp_path / "nowhere", "-o", tmp_path / "out") == "E_MISSING"
    assert refusal("compress", MODEL, "-o", tmp_path / "out", "--recipe", tmp_path / "no.toml") == "E_MISSING"


def test_compress_wrong_usage(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert refusal("compress", MODEL, *out, "--format", "int5", code=ExitCode.USAGE) == "USAGE"
    assert refusal("compress", MODEL, *out, "--format", "float7", code=ExitCode.USAGE) == "USAGE"
    assert refusal("compress", MODEL, *out, "--group", "7", code=ExitCode.USAGE) == "USAGE"
    wrong_pair = ("--format", "int4", "--method", "ternary-minmax")
    assert refusal("compress", MODEL, *out, *wrong_pair, code=ExitCode.USAGE) == "USAGE"
    both = ("--format", "int4", "--recipe", tmp_path / "recipe.toml")
    assert refusal("compress", MODEL, *out, *both, code=ExitCode.USAGE) == "USAGE"
    assert qmoe("compress", MODEL).exit_code == ExitCode.USAGE
    assert qmoe("compress", MODEL, *out, "--method", "magic").exit_code == ExitCode.USAGE
    assert qmoe("no-such-command").exit_code == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_compress_busy(tmp_path: Path) -> None:
    with Journal(tmp_path / "out"):
        assert refusal("compress", MODEL, "-o", tmp_path / "out", code=ExitCode.BUSY) == "E_BUSY"


def test_compress_output_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert refusal("compress", MODEL, "-o", tmp_path / "file" / "out", code=ExitCode.IO) == "E_IO"


def test_choices_are_those_of_the_library() -> None:
    assert {method.value for method in Method} == set(METHODS)
    assert {scale.value for scale in ScaleType} == set(SCALE_DTYPES)


# eval


def test_eval_text_and_tokens_agree(compressed: Path, tmp_path: Path) -> None:
    from qmoe_core.evaluation import encode_text

    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    np.save(tmp_path / "ids.npy", encode_text(compressed, short.read_text(encoding="utf-8")).astype(np.uint16))
    options = ("--window", 64, "--max-tokens", 256)
    a = qmoe_json("eval", compressed, "--text", short, *options)
    b = qmoe_json("eval", compressed, "--tokens", tmp_path / "ids.npy", *options, "--reference", MODEL)
    assert a["perplexity"] == b["perplexity"] and a["windows"] == 4
    assert a["kl"] is None and b["kl"] > 0
    assert 0.5 < b["top1_agreement"] < 1 and 0.5 < b["router_agreement"] <= 1


def test_eval_for_people_has_standard_errors(compressed: Path) -> None:
    result = qmoe("eval", compressed, "--text", TEXT, "--max-tokens", 128, "--window", 64, "--reference", MODEL)
    assert result.exit_code == 0
    for name in ("perplexity", "KL divergence", "top-1 agreement", "router agreement"):
        line = next(line for line in result.stdout.splitlines() if line.startswith(name))
        assert "±" in line


def test_eval_refuses(compressed: Path, tmp_path: Path) -> None:
    assert refusal("eval", compressed, code=ExitCode.USAGE) == "USAGE"
    assert refusal("eval", compressed, "--tokens", tmp_path / "no.npy") == "E_MISSING"
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    assert refusal("eval", compressed, "--tokens", tmp_path / "bad.npy") == "E_CORRUPT"
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    assert refusal("eval", compressed, "--tokens", tmp_path / "pickled.npy") == "E_CORRUPT"
    np.save(tmp_path / "outside.npy", np.full(1024, 4096))
    assert refusal("eval", compressed, "--tokens", tmp_path / "outside.npy") == "E_VALUE"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    assert refusal("eval", compressed, "--text", tmp_path / "latin.txt") == "E_CORRUPT"
    assert refusal("eval", tmp_path, "--tokens", tmp_path / "outside.npy") == "E_MISSING"


# generate


def test_generate_streams_the_same_text_that_json_has(compressed: Path) -> None:
    value = qmoe_json("generate", compressed, "--prompt", "The old house", "-n", 8)
    assert len(value["tokens"]) == 8 and value["text"]
    result = qmoe("generate", compressed, "--prompt", "The old house", "-n", 8)
    assert result.stdout == "The old house" + value["text"] + "\n"
    assert "tokens/s" in result.stderr


def test_generate_seed_repeats(compressed: Path) -> None:
    options = ("--prompt", "It was", "-n", 6, "--temperature", 1.0, "--seed")
    first, again, other = (qmoe_json("generate", compressed, *options, seed) for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]


def test_generate_refuses(compressed: Path, tmp_path: Path) -> None:
    assert refusal("generate", tmp_path, "--prompt", "x") == "E_MISSING"
    assert refusal("generate", compressed, "--prompt", "x", "--top-p", 2) == "E_VALUE"


# inspect and verify


def test_inspect_lists_every_packed_tensor(compressed: Path) -> None:
    value = qmoe_json("inspect", compressed)
    result = qmoe("inspect", compressed)
    assert len(value["tensors"]) == 8
    for entry in value["tensors"]:
        line = next(line for line in result.stdout.splitlines() if entry["name"] in line)
        assert f"{entry['bits_per_weight']:.3f}" in line and f"{entry['relative_error']:.4f}" in line
        assert "int4-g128" in line


def test_inspect_and_verify_refuse_what_is_not_compressed(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        assert refusal(command, MODEL) == "E_MISSING"
        assert refusal(command, tmp_path / "nowhere") == "E_MISSING"


def test_verify_sound(compressed: Path) -> None:
    value = qmoe_json("verify", compressed)
    assert value["ok"] is True and value["problems"] == []
    assert value["packed_tensors"] == 8 and value["matrices"] == 64
    assert value["nbytes"] == sum(file.stat().st_size for file in compressed.iterdir())
    assert "sound" in qmoe("verify", compressed).stdout


def problems(directory: Path) -> list[tuple[str, str, str | None]]:
    value = qmoe_json("verify", directory, code=ExitCode.FAILED)
    assert value["ok"] is False
    assert qmoe("verify", directory).exit_code == ExitCode.FAILED
    return [(problem["code"], problem["file"], problem["tensor"]) for problem in value["problems"]]


def test_verify_finds_every_flipped_tensor(damaged: Path) -> None:
    from qmoe_core import _C

    path = damaged / "model.safetensors"
    with _C.SafetensorsFile(str(path)) as file:
        tensors = file.tensors
    packed = "model.layers.1.mlp.experts.down_proj_qmoe"
    for name in ("model.norm.weight", packed):
        flip(path, tensors[name][3] - 1)
    assert problems(damaged) == [
        ("E_CHECKSUM", "model.safetensors", name)
        for name in sorted(("model.norm.weight", packed), key=lambda name: tensors[name][2])
    ]


def test_verify_finds_a_record_that_only_looks_right(damaged: Path) -> None:
    """Both checksums mended: only the strict decode can tell."""
    from qmoe_core import _C

    path, name = damaged / "model.safetensors", "model.layers.1.mlp.experts.down_proj_qmoe"
    with _C.SafetensorsFile(str(path)) as file:
        begin, end = file.tensors[name][2:]
        other = file.read("model.layers.2.mlp.experts.down_proj_qmoe")
    record = _C.slice_experts(other, 0, 4)
    data = bytearray(path.read_bytes())
    data[begin : begin + len(record)] = record.tobytes()
    path.write_bytes(data)
    description = json.loads((damaged / "qmoe.json").read_text())
    description["packed"][name]["crc32c"] = _C.crc32c(np.frombuffer(bytes(data[begin:end]), np.uint8), 0)
    size = (damaged / "qmoe.json").stat().st_size
    (damaged / "qmoe.json").write_text(json.dumps(description, separators=(",", ":")).ljust(size))
    assert [(tensor, code) for code, _, tensor in problems(damaged)] == [(name, "E_OFFSET")]


def test_verify_finds_other_damage(damaged: Path) -> None:
    flip(damaged / "tokenizer.json", 1000)
    assert problems(damaged) == [("E_CHECKSUM", "tokenizer.json", None)]
    (damaged / "tokenizer.json").unlink()
    assert problems(damaged) == [("E_MISSING", "tokenizer.json", None)]


def test_verify_finds_a_short_shard(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert {code for code, file, _ in problems(damaged) if file == "model.safetensors"} == {"E_TRUNCATED"}


def test_verify_finds_a_changed_config(damaged: Path) -> None:
    path = damaged / "config.json"
    config = path.read_text()
    assert '"nbytes": ' in config
    path.write_text(config.replace('"nbytes": 6', '"nbytes": 7', 1).replace('"nbytes": 1', '"nbytes": 2', 1))
    assert [(code, file) for code, file, _ in problems(damaged)] == [("E_CORRUPT", "config.json")]


def test_verify_does_not_mind_other_files(damaged: Path) -> None:
    (damaged / "notes.txt").write_text("mine")
    assert qmoe_json("verify", damaged)["unknown_files"] == ["notes.txt"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ""])
def test_verify_refuses_names_that_leave_the_directory(damaged: Path, name: str) -> None:
    description = json.loads((damaged / "qmoe.json").read_text())
    description["files"][name] = 10
    (damaged / "qmoe.json").write_text(json.dumps(description))
    assert refusal("verify", damaged) == "E_CORRUPT"


def test_verify_refuses_a_malformed_description(damaged: Path) -> None:
    path = damaged / "qmoe.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "packed": {"x": {}}}))
    assert refusal("verify", damaged) == "E_CORRUPT"
    path.write_text("{")
    assert refusal("verify", damaged) == "E_CORRUPT"
    path.write_text(json.dumps({**description, "version": 99}))
    assert refusal("verify", damaged) == "E_VERSION"


# quickstart


def test_quickstart_tells_the_whole_story(tmp_path: Path) -> None:
    options = ("-o", tmp_path, "--max-tokens", 128, "--window", 64, "--new-tokens", 3)
    value = qmoe_json("quickstart", *options)
    names = [row["name"] for row in value["rows"]]
    assert names == ["original", "int8-g128", "int4-g128", "int3-g128", "int2-g64", "ternary"]
    bits = [row["bits_per_parameter"] for row in value["rows"]]
    assert bits == sorted(bits, reverse=True)
    for row in value["rows"]:
        assert row["quality"]["perplexity"] > 1 and row["sample"]
        assert row["is_original"] or qmoe("verify", tmp_path / "models" / row["name"]).exit_code == 0
    page = Path(value["html"]).read_text(encoding="utf-8")
    for name in names:
        assert f"<td>{name}</td>" in page
    assert page.count("data:image/png;base64,") == len(value["plots"]) == 4
    assert "http://" not in page and "https://" not in page and "<script" not in page
    for plot in value["plots"]:
        from matplotlib.image import imread

        assert imread(plot).shape[0] > 300
    assert json.loads(Path(value["json"]).read_text())["rows"] == value["rows"]
    again = qmoe("quickstart", *options)  # finished models are used again
    assert again.exit_code == 0 and "report.html" in again.stdout


def test_report_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    from qmoe_core.evaluation import EvalResult
    from qmoe_core.htmlreport import FormatRow, Report, write_report

    quality = EvalResult(9.0, None, 2.2, None, 0.1, None, 0.9, None, 0.9, None, 63, 1, 64, 0.1)
    rows = tuple(
        FormatRow(name, 8.0, 4.0, 1000, 500, quality, 10.0, "<script>alert(1)</script>", name == "original", {"a": 0.1})
        for name in ("original", "int4")
    )
    files = write_report(tmp_path, Report("t", "m", "text", "<b>prompt</b>", rows))
    page = files.html.read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


# What all commands share


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from qmoe_core.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("compress", "eval", "generate", "inspect", "verify", "quickstart"):
        assert command in result.stdout


def test_every_exit_code_is_documented() -> None:
    for code in ExitCode:
        assert f" {int(code)} " in EXIT_HELP, code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QmoeError("E_NO_SPACE", "No space left on device"), ExitCode.IO),
        (QmoeError("E_CHECKSUM", "x"), ExitCode.REFUSED),
        (OSError(5, "Input/output error"), ExitCode.IO),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), ExitCode.NOT_INSTALLED),
        (ModuleNotFoundError("No module named 'nonsense'", name="nonsense"), ExitCode.UNEXPECTED),
        (RuntimeError("two\nlines"), ExitCode.UNEXPECTED),
    ],
)
def test_errors_become_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: ExitCode
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qmoe_core.checkpoint.compress", fail)
    refusal("compress", MODEL, "-o", tmp_path / "out", code=code)
    debug = qmoe("--debug", "compress", MODEL, "-o", tmp_path / "out")
    assert debug.exit_code == code
    assert ("Traceback" in debug.stderr) == (code is not ExitCode.INTERRUPTED)


def test_as_a_process_with_progress_bars(tmp_path: Path) -> None:
    """stdout stays pure JSON while bars are drawn on stderr."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "qmoe_core", "compress", MODEL, "-o", tmp_path / "out", "-f", "int2", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"]
    assert "ETA" in result.stderr and "4.6/4.6 MB" in result.stderr.replace(" MB/4", "/4")
    command = [sys.executable, "-m", "qmoe_core", "verify", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""  # no bar where stderr is no terminal
