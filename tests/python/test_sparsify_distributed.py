"""Pruning by two processes: what one process makes, but for the order of summation, and the same errors on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_fixtures import tiny_model
from test_distributed import hashes, spec_of, together

from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import PruneSettings, prune_checkpoint, prune_experts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_two_processes_make_what_one_does(method, source, tmp_path):
    settings = PruneSettings(method, "2:4", roles=("expert", "attention"))

    def run(output: Path) -> Any:
        torch.set_num_threads(1)
        return prune_checkpoint(source, output, settings, calibration=spec_of())

    alone = run(tmp_path / "one").masks()
    reports = together(2, tmp_path, lambda rank: run(tmp_path / "two"))
    assert [type(report).__name__ for report in reports] == ["PruneReport"] * 2, reports
    assert reports[0].tensors == reports[1].tensors
    found = reports[0].masks()
    assert list(found) == list(alone)
    differ = sum(int((found[name] ^ alone[name]).sum()) for name in alone)
    assert differ <= sum(mask.numel() for mask in alone.values()) // 1000  # ties that rounding decides
    together(2, tmp_path, lambda rank: run(tmp_path / "again"))
    assert hashes(tmp_path / "two") == hashes(tmp_path / "again")


def test_two_processes_keep_the_experts_that_one_keeps(source, tmp_path):
    def run(output: Path) -> Any:
        torch.set_num_threads(1)
        return prune_experts(source, output, 2, spec_of())

    alone = run(tmp_path / "one")
    reports = together(2, tmp_path, lambda rank: run(tmp_path / "two"))
    for report in reports:
        assert [layer.kept for layer in report.layers] == [layer.kept for layer in alone.layers]
        assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in alone.layers]


def test_both_raise_what_one_does(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    errors = together(
        2,
        tmp_path,
        lambda rank: prune_checkpoint(source, tmp_path / "out", PruneSettings("wanda"), calibration=spec_of()),
    )
    assert [error.code for error in errors if isinstance(error, QmoeError)] == ["E_VALUE", "E_VALUE"]
