"""qmoe compress --calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qmoe_core.cli.app import app

MODEL = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    return path


def run(*arguments: object) -> tuple[int, dict, str]:
    result = CliRunner().invoke(app, ["compress", str(MODEL), *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_text_is_encoded_and_the_report_tells_what_was_used(text, tmp_path):
    options = ["--format", "int2", "--group", 64, "--calibration", text, "--calibration-tokens", 512]
    code, result, _ = run("-o", tmp_path / "out", *options, "--calibration-window", 64, "--drift")
    assert code == 0
    settings = result["calibration"]
    assert (settings["tokens"], settings["window"], settings["drift"], settings["device"]) == (512, 64, True, "cpu")
    for entry in result["tensors"]:
        assert entry["method"] == "gptq"
        seen = entry["calibration"]
        assert len(seen["tokens"]) == entry["shape"][0] and sum(seen["tokens"]) % 512 == 0
        assert seen["min"] <= seen["median"] <= seen["max"]
        assert len(seen["notes"]) == sum(tokens < entry["shape"][2] for tokens in seen["tokens"])
    table = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "512 tokens in windows of 64" in table and "rare experts" in table


@pytest.mark.parametrize(
    ("options", "exit_code", "error"),
    [
        (["--method", "gptq"], 3, "E_VALUE"),
        (["--calibration", "TEXT", "--method", "rtn"], 3, "E_VALUE"),
        (["--calibration", "TEXT", "--calibration-tokens", "100"], 3, "E_VALUE"),
        (["--calibration", "TEXT", "--device", "cuda:77"], 3, "E_NO_KERNEL"),
        (["--calibration", "absent.npy"], 3, "E_MISSING"),
        (["--calibration", "IDS"], 3, "E_VALUE"),
        (["--calibration-tokens", "4096"], 2, "USAGE"),
        (["--recover"], 2, "USAGE"),
        (["--calibration", "TEXT", "--recover-steps", "3"], 2, "USAGE"),
        (["--calibration", "TEXT", "--option", "sweeps"], 2, "USAGE"),
        (["--calibration", "TEXT", "--option", "speed=3"], 2, "USAGE"),
    ],
)
def test_mistakes_are_typed(text, tmp_path, options, exit_code, error):
    np.save(tmp_path / "ids.npy", np.full(4096, 10**6))
    places = {"TEXT": text, "IDS": tmp_path / "ids.npy"}
    code, result, stderr = run("-o", tmp_path / "out", *(places.get(option, option) for option in options))
    assert (code, result["error"]["code"]) == (exit_code, error)
    assert stderr.startswith("qmoe: error: ") and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_of_the_method_reach_the_recipe(text, tmp_path):
    options = ["--calibration", text, "--calibration-tokens", 512, "--gate-weighted", "--half-step", "--symmetric"]
    options += ["--format", "int2", "--group", 16, "--option", "sweeps=1", "--option", "order=activation"]
    code, result, _ = run("-o", tmp_path / "out", *options)
    assert code == 0 and result["calibration"]["gate_weighted"] is True
    assert {entry["format"] for entry in result["tensors"]} == {"int2-g16-sym-half"}
    (rule,) = result["recipe"]["rule"]
    assert rule["options"] == {"sweeps": 1, "order": "activation"}


def test_recover_leaves_one_finished_directory(text, tmp_path):
    text.write_text(text.read_text() * 8)  # validation windows, and one step of training
    options = ["--calibration", text, "--calibration-tokens", 512, "--format", "ternary"]
    code, result, _ = run("-o", tmp_path / "out", *options, "--recover", "--recover-steps", 2)
    assert code == 0 and result["recovery"]["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    code, result, _ = run("-o", tmp_path / "out", *options, "--recover")
    assert code == 2 and "finished" in result["error"]["message"]


def test_recover_follows_a_budget_that_needs_no_calibration(text, tmp_path):
    text.write_text(text.read_text() * 8)
    options = ["--bits", 12, "--calibration", text, "--calibration-tokens", 512, "--recover", "--recover-steps", 2]
    code, result, _ = run("-o", tmp_path / "out", *options)
    assert code == 0 and result["recovery"]["steps"] == 2
    assert {entry["method"] for entry in result["tensors"]} == {"rtn"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
