"""`qmoe tune`: what it measures, keeps and takes over."""

from __future__ import annotations

import json

import pytest
import torch
from packed_fixtures import pack
from typer.testing import CliRunner

from qmoe_core import _C
from qmoe_core.cli.app import app
from qmoe_core.errors import QmoeError
from qmoe_core.runtime import ops, tuning


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMOE_TUNING", str(tmp_path / "cache" / "tuning.json"))
    before = _C.tuning()
    yield
    _C.set_tuning(**before)


def test_tuning_is_measured_kept_and_taken_over(monkeypatch):
    monkeypatch.setattr(tuning, "SHAPE", (256, 256))
    monkeypatch.setattr(tuning, "COLD_BYTES", 1 << 20)
    assert not tuning.load()
    said: list[str] = []
    result = tuning.tune(1, 0.001, said.append)
    assert result.values == _C.tuning()
    assert said
    for width in ("narrow", "wide"):
        far, near, both = (result.trials[f"{kind}_{width}"] for kind in ("prefetch", "near", "both"))
        assert set(far) == set(tuning.PREFETCH) and set(near) == set(tuning.NEAR)
        beside = min(tuning.PREFETCH[1:], key=far.__getitem__)
        assert set(both) == {distance for distance in tuning.NEAR if distance < beside}
        best = min([*far.values(), *near.values(), *both.values()])
        of_values = result.values[f"prefetch_{width}"], result.values[f"near_{width}"]
        assert best == (
            both[of_values[1]] if all(of_values) else near[of_values[1]] if of_values[1] else far[of_values[0]]
        )
    _C.set_tuning(64, 128, 3, 0, 64)
    assert tuning.load() and _C.tuning() == result.values


def test_values_of_other_machines_stay_and_damaged_files_are_no_files(monkeypatch):
    monkeypatch.setattr(tuning, "machine", lambda: "one")
    others = {"near_narrow": 0, "near_wide": 64}
    path = tuning.save({"prefetch_narrow": 128, "prefetch_wide": 0, "direct_tokens": 5, **others})
    monkeypatch.setattr(tuning, "machine", lambda: "two")
    assert not tuning.load()
    values = {"prefetch_narrow": 256, "prefetch_wide": 512, "direct_tokens": 6, **others}
    tuning.save(values)
    assert set(json.loads(path.read_text())["machines"]) == {"one", "two"}
    assert tuning.load() and _C.tuning() == values
    for damaged in (
        "",
        "{",
        '{"machines": {"two": {"prefetch_narrow": 128, "prefetch_wide": 0, "direct_tokens": 5}}}',
        '{"machines": {"two": {"prefetch_narrow": 1e9, "prefetch_wide": 0, "direct_tokens": "x",'
        ' "near_narrow": 0, "near_wide": 0}}}',
        "[]",
    ):
        path.write_text(damaged)
        assert not tuning.load()


def test_results_do_not_depend_on_it():
    packed = torch.from_numpy(pack(torch.randn(1, 100, 300)).data)
    x = torch.randn(20, 300)
    before = ops.linear(x, packed, 100, "int8")
    for values in ((0, 0, 0, 0, 0), (4096, 64, 30, 0, 192), (0, 0, 30, 128, 64)):
        _C.set_tuning(*values)
        assert torch.equal(ops.linear(x, packed, 100, "int8"), before)
    with pytest.raises(QmoeError, match="E_VALUE"):
        _C.set_tuning(1 << 21, 0, 8, 0, 0)
    with pytest.raises(QmoeError, match="E_VALUE"):
        _C.set_tuning(0, 0, 8, 0, 1 << 21)


def test_the_command(monkeypatch):
    monkeypatch.setattr(tuning, "SHAPE", (128, 128))
    monkeypatch.setattr(tuning, "COLD_BYTES", 1 << 20)
    result = CliRunner().invoke(app, ["tune", "--threads", "1", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["values"] == _C.tuning()
