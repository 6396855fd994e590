"""Hugging Face data sets as calibration text: local directories, and none of them over the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qmoe_core.calibration import CalibrationSpec
from qmoe_core.calibration.spec import load_tokens
from qmoe_core.checkpoint import compress
from qmoe_core.errors import QmoeError
from qmoe_core.evaluation import encode_text
from qmoe_core.generation import load_tokenizer
from qmoe_core.recipe import Recipe

datasets = pytest.importorskip("datasets")

MODEL = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"
DOCUMENTS = [f"Chapter {number}. It was a dark and stormy night; the rain fell in torrents." for number in range(40)]
KINDS = ("text", "jsonl", "parquet", "saved", "saved splits")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """The same documents in every form that a local data set has."""
    made = {kind: tmp_path_factory.mktemp(kind.replace(" ", "-")) for kind in KINDS}
    (made["text"] / "train.txt").write_text("\n".join(DOCUMENTS))
    lines = [json.dumps({"text": text, "year": 1830}) for text in DOCUMENTS]
    (made["jsonl"] / "train.jsonl").write_text("\n".join(lines))
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS, "year": [1830] * len(DOCUMENTS)})
    rows.to_parquet(made["parquet"] / "train.parquet")
    rows.save_to_disk(made["saved"])
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(made["saved splits"])
    return made


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def ids_of(source: Path, **settings) -> np.ndarray:
    spec = CalibrationSpec(str(source), **{"window": 8, "max_tokens": 10**6, "seed": None, **settings})
    return load_tokens(spec, MODEL, 4096).ids.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_joined_by_blank_lines(directories, kind):
    tokenizer = load_tokenizer(MODEL)
    expected = np.concatenate([encode_text(tokenizer, text + "\n\n") for text in DOCUMENTS])
    found = ids_of(directories[kind])
    assert len(expected) - 8 < len(found) <= len(expected)
    np.testing.assert_array_equal(found, expected[: len(found)])


def test_no_more_is_read_than_is_needed(directories, monkeypatch):
    import qmoe_core.evaluation as evaluation

    calls = []
    real = evaluation.encode_text
    monkeypatch.setattr(evaluation, "encode_text", lambda *a: calls.append(a) or real(*a))
    assert len(ids_of(directories["jsonl"], max_tokens=64)) == 64
    assert 0 < len(calls) < 10


def test_splits_and_fields_can_be_named(directories, tmp_path):
    assert len(ids_of(directories["saved splits"], split="test")) < len(ids_of(directories["saved splits"])) / 5
    datasets.Dataset.from_dict({"story": DOCUMENTS}).to_parquet(tmp_path / "train.parquet")
    np.testing.assert_array_equal(ids_of(tmp_path, text_field="story"), ids_of(directories["parquet"]))


@pytest.mark.parametrize(
    ("kind", "settings", "code"),
    [
        ("jsonl", {"text_field": "title"}, "E_MISSING"),
        ("jsonl", {"text_field": "year"}, "E_VALUE"),
        ("jsonl", {"split": "validation"}, "E_MISSING"),
        ("saved splits", {"split": "validation"}, "E_MISSING"),
        ("saved", {"window": 2048, "max_tokens": 4096}, "E_VALUE"),
    ],
)
def test_what_is_not_there_is_said(directories, kind, settings, code):
    with pytest.raises(QmoeError) as error:
        ids_of(directories[kind], **settings)
    assert error.value.code == code


def test_names_are_looked_up_on_the_hub_and_not_found_offline():
    with pytest.raises(QmoeError) as error:
        ids_of(Path("nobody/has-this"))
    assert error.value.code == "E_MISSING" and "nobody/has-this" in str(error.value)


def test_empty_and_damaged_directories(tmp_path):
    with pytest.raises(QmoeError) as error:
        ids_of(tmp_path)
    assert error.value.code == "E_MISSING"
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(QmoeError) as error:
        ids_of(tmp_path)
    assert error.value.code == "E_MISSING"


def test_a_model_is_calibrated_on_a_data_set(directories, tmp_path):
    spec = CalibrationSpec(str(directories["jsonl"]), window=64, max_tokens=512)
    report = compress(MODEL, tmp_path / "out", Recipe.uniform("int4", 64, "gptq"), calibration=spec)
    assert report.calibration["tokens"] == 512
