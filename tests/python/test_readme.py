"""What the README says, held against the code: exit codes, the tests that its promises name, tables, files, options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmoe_core.cli.output import ExitCode
from qmoe_core.quantize import METHODS
from qmoe_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_exit_code_has_its_row() -> None:
    table = README.partition("| code | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert [int(row) for row in rows] == sorted(int(code) for code in ExitCode)


def test_every_method_has_its_row() -> None:
    assert set(METHODS) <= set(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE))


def test_promises_name_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(named) > 5
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / "python" / file).read_text(encoding="utf-8"), (file, test)


def test_files_that_it_names_exist() -> None:
    paths = re.findall(r"`((?:tests|cpp|bench)/[\w./]+)`", README) + re.findall(r"\]\((?!http)([\w./]+)\)", README)
    paths += [f"tests/python/{file}" for file in re.findall(r"`(test_\w+\.py)", README)]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text)
    assert len(Recipe.from_toml(tmp_path / "recipe.toml").rules) == 3


@pytest.mark.parametrize(("number", "words"), [(1, ("pip install", "qmoe quickstart")), (2, ("pip install", "pytest"))])
def test_its_first_commands_are_those_that_ci_runs(number: int, words: tuple[str, ...]) -> None:
    command = [sys.executable, ROOT / ".ci" / "readme_commands.py", str(number)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(word in result.stdout for word in words) and f"\n{result.stdout}" in README


def test_tables_are_not_stale() -> None:
    result = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
