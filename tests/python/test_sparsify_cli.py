"""qmoe prune and qmoe prune-experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qmoe_core.cli.app import app
from qmoe_core.cli.prune import PruneMethod
from qmoe_core.cli.prune_experts import Score
from qmoe_core.sparsify import Masks
from qmoe_core.sparsify.methods import METHODS
from qmoe_core.sparsify.saliency import SCORES

MODEL = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    return path


def run(*arguments: object, command: str = "prune") -> tuple[int, dict, str]:
    result = CliRunner().invoke(app, [command, str(MODEL), *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_the_methods_are_those_of_the_library():
    assert [method.value for method in PruneMethod] == list(METHODS)
    assert [score.value for score in Score] == list(SCORES)


def test_calibrated_2_4_is_the_default_with_text(text, tmp_path):
    options = ["-o", tmp_path / "out", "--calibration", text, "--calibration-tokens", 512, "--calibration-window", 64]
    code, result, _ = run(*options)
    assert code == 0
    assert (result["settings"]["method"], result["settings"]["pattern"], result["sparsity"]) == (
        "sparsegpt",
        "2:4",
        0.5,
    )
    assert result["calibration"]["tokens"] == 512
    assert result["peak_rss_bytes"] - result["start_rss_bytes"] <= result["rss_limit_bytes"]
    Masks.load(tmp_path / "out" / "masks.qmoe").check()
    shown = CliRunner().invoke(app, ["prune", str(MODEL), *map(str, options)]).stdout
    assert "50.0% of them zero" in shown and "continuing an interrupted run" in shown


def test_options_reach_the_method(tmp_path):
    options = ["--pattern", "unstructured", "--sparsity", 0.75, "--method", "random", "--option", "seed=7"]
    code, result, _ = run("-o", tmp_path / "out", *options, "--distribution", "erk", "--roles", "expert,attention")
    assert code == 0
    assert result["settings"]["options"] == {"seed": 7} and result["settings"]["roles"] == ["expert", "attention"]
    assert result["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert {entry["role"] for entry in result["tensors"]} == {"expert", "attention"}


@pytest.mark.parametrize(
    ("options", "exit_code", "error"),
    [
        (["--method", "wanda"], 3, "E_VALUE"),
        (["--method", "magnitude", "--calibration", "TEXT"], 3, "E_VALUE"),
        (["--pattern", "5:7:9"], 2, "USAGE"),
        (["--pattern", "unstructured"], 2, "USAGE"),
        (["--pattern", "2:6"], 3, "E_SHAPE"),
        (["--option", "seed=1"], 2, "USAGE"),
        (["--roles", "router"], 2, "USAGE"),
        (["--calibration-tokens", "64"], 2, "USAGE"),
    ],
)
def test_refusals(options, exit_code, error, text, tmp_path):
    options = [str(text) if option == "TEXT" else option for option in options]
    code, result, _ = run("-o", tmp_path / "out", *options)
    assert (code, result["error"]["code"]) == (exit_code, error)


def test_experts_are_taken_out(text, tmp_path):
    options = ["--calibration", text, "--calibration-tokens", 512, "--calibration-window", 64]
    code, result, _ = run("-o", tmp_path / "out", "--keep", 0.5, *options, command="prune-experts")
    assert code == 0
    assert result["keep"] * 2 == result["experts"] == len(result["layers"][0]["scores"])
    assert result["parameters"] < result["original_parameters"]
    again = ["-o", tmp_path / "out", "--keep", result["keep"], *options]
    assert run(*again, command="prune-experts")[1]["resumed"]
    shown = CliRunner().invoke(app, ["prune-experts", str(MODEL), *map(str, again)]).stdout
    assert f"{result['keep']} of {result['experts']} in each of" in shown
    assert run(*again, "--score", "frequency", command="prune-experts")[1]["error"]["code"] == "E_CHANGED"
    few = ["-o", tmp_path / "few", "--keep", 1, *options]
    assert run(*few, command="prune-experts")[:1] == (3,)
    none = ["-o", tmp_path / "few", "--keep", "most", *options]
    assert run(*none, command="prune-experts")[:1] == (2,)
