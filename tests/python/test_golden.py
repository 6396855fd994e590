"""Records that version 1 wrote, read through the Python package; tests/cpp/test_golden.cpp is the C++ side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qmoe_core import _C
from qmoe_core.formats import PackedTensor

V1 = Path(__file__).resolve().parents[1] / "golden" / "v1"
MANIFEST = [line.split() for line in (V1 / "manifest.txt").read_text().splitlines()]


def test_the_manifest_and_the_directory_agree() -> None:
    assert len(MANIFEST) >= 35
    assert {name for name, *_ in MANIFEST} == {path.stem for path in V1.glob("*.qmoe")}


@pytest.mark.parametrize(("name", "nbytes", "crc", "values_crc"), MANIFEST, ids=[line[0] for line in MANIFEST])
def test_stored_record_decodes_to_its_values(name: str, nbytes: str, crc: str, values_crc: str) -> None:
    data = np.fromfile(V1 / f"{name}.qmoe", np.uint8)
    assert data.size == int(nbytes)
    assert _C.crc32c(data) == int(crc, 16)
    tensor = PackedTensor(data)
    tensor.verify()
    running = 0
    for expert in range(tensor.experts):
        running = _C.crc32c(tensor.decode(expert).reshape(-1).view(np.uint8), running)
    assert running == int(values_crc, 16)
