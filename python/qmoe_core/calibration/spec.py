"""What a calibrated compression is calibrated on: text or token ids, and how much of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QmoeError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CalibrationSpec:
    """Where calibration tokens come from and how they are used.

    Attributes:
        source: token ids (1-D integers), a .npy file of them, a UTF-8 text file, or a Hugging Face data set: its name
            on the Hub ("name" or "name:configuration"), or a local directory of data files or of `save_to_disk`. Data
            sets need the `datasets` package. Text is encoded by the model's own tokenizer.
        window: tokens per window. Windows are disjoint, nothing is added to them, a partial last one is dropped.
        max_tokens: how many tokens to use.
        batch_size: windows per forward pass.
        seed: which windows are used where there are more than `max_tokens`: drawn without replacement, kept in order.
            None takes the first.
        buffer_bytes: memory for activations between and within layers; what goes beyond lies in files in the journal.
            On CUDA each kind of them lies on the device instead where it takes at most an eighth of the free memory
            there. None of this changes the result.
        chunk_bytes: memory for the Hessians and float32 weights of the experts that are quantized together; None for
            512 MiB on a CPU and 5 GiB on CUDA. Each of several processes holds the weights of as many such chunks as
            there are processes.
        gate_weighted: scale every token's row by its routing weight g, so that an expert's Hessian is the sum of
            g^2 x x^T: the error that remains in the layer's output instead of that in the expert's own. Pooled sums
            use the mean g^2 of the token's choices.
        drift: also run the original model and collect how far the compressed one's activations have moved from it
            (`StackStatistics.drift`). Twice the time and memory.
        dtype: "float32", or "bfloat16" on CUDA, for the layer's own computation; statistics are float32 always.
        text_field, split: where the text is in a data set.
    """

    source: Any
    window: int = 512
    max_tokens: int = 131072
    batch_size: int = 8
    seed: int | None = 0
    buffer_bytes: int = 1 << 30
    chunk_bytes: int | None = None
    gate_weighted: bool = False
    drift: bool = False
    dtype: str = "float32"
    text_field: str = "text"
    split: str = "train"

    def __post_init__(self) -> None:
        """Raises `E_VALUE` for settings out of range."""
        for name, low in (("window", 2), ("max_tokens", 2), ("batch_size", 1), ("buffer_bytes", 0), ("chunk_bytes", 1)):
            value = getattr(self, name)
            if name == "chunk_bytes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise QmoeError("E_VALUE", f"calibration: {name} is out of range", expected=f">= {low}", actual=value)
        if self.dtype not in DTYPES:
            raise QmoeError("E_VALUE", "calibration: unknown dtype", expected=DTYPES, actual=self.dtype)

    def chunk_on(self, device: str) -> int:
        """`chunk_bytes`, or what None means on this device."""
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        return 5 << 30 if device.startswith("cuda") else 512 << 20


@dataclass(frozen=True)
class CalibrationTokens:
    """The windows themselves: `ids` (windows, window) int64, and how many tokens there were to choose from."""

    ids: np.ndarray
    available: int

    def describe(self, spec: CalibrationSpec, device: str) -> dict[str, Any]:
        """What identifies the calibration, for the journal and for qmoe.json. `buffer_bytes` and where the tokens come
        from are not in it: neither changes the result."""
        return {
            "tokens": int(self.ids.size),
            "available_tokens": self.available,
            "window": spec.window,
            "batch_size": spec.batch_size,
            "seed": spec.seed,
            "chunk_bytes": spec.chunk_on(device),
            "gate_weighted": spec.gate_weighted,
            "drift": spec.drift,
            "dtype": spec.dtype,
            "device": device,
            "sha256": hashlib.sha256(np.ascontiguousarray(self.ids, dtype="<i8").tobytes()).hexdigest(),
        }


def load_tokens(spec: CalibrationSpec, model: Path, vocabulary: int) -> CalibrationTokens:
    """The windows that `spec` describes.

    Args:
        model: the checkpoint whose tokenizer encodes text.
        vocabulary: ids must be below this.

    Raises:
        QmoeError: `E_MISSING` (no such file, no tokenizer, `datasets` is not installed), `E_CORRUPT` (not a .npy file,
            not UTF-8), `E_VALUE` (not one full window, ids outside the vocabulary, a field of a data set that is no
            text).
    """
    tokens = np.asarray(_ids(spec, model))
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise QmoeError("E_VALUE", "calibration tokens must be 1-D integers", actual=f"{tokens.ndim}-D {tokens.dtype}")
    windows, wanted = len(tokens) // spec.window, spec.max_tokens // spec.window
    if min(windows, wanted) == 0:
        raise QmoeError(
            "E_VALUE",
            "too few calibration tokens: not one full window",
            expected=f">= {spec.window}",
            actual=min(len(tokens), spec.max_tokens),
        )
    ids = tokens[: windows * spec.window].reshape(windows, spec.window)
    if windows > wanted:
        chosen = np.arange(wanted)
        if spec.seed is not None:
            chosen = np.sort(np.random.default_rng(spec.seed).choice(windows, wanted, replace=False))
        ids = ids[chosen]
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise QmoeError(
            "E_VALUE",
            "calibration: token id outside the vocabulary",
            expected=f"0..{vocabulary - 1}",
            actual=low if low < 0 else high,
        )
    return CalibrationTokens(ids, len(tokens))


def tokens_for(source: Path, spec: CalibrationSpec) -> np.ndarray:
    """The windows that calibrating the checkpoint `source` uses, one behind the other: (n,) int64. Raises as
    `load_tokens`."""
    from ..families import build_meta_model

    vocabulary = build_meta_model(source).config.get_text_config(decoder=True).vocab_size
    return load_tokens(spec, source, int(vocabulary)).ids.reshape(-1)


def _ids(spec: CalibrationSpec, model: Path) -> Any:
    source = spec.source
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if path.suffix == ".npy":
        from ..evaluation import read_ids

        return read_ids(path)
    if path.is_file():
        try:
            return _encode(path.read_text(encoding="utf-8"), model)
        except UnicodeDecodeError as error:
            raise QmoeError("E_CORRUPT", f"calibration text is not UTF-8: {error}", file=path) from error
    if not path.is_dir() and (path.suffix in (".txt", ".md", ".text") or path.is_absolute()):
        raise QmoeError("E_MISSING", "no such calibration file", file=path)
    return _dataset(spec, str(source), model)


def _encode(text: str, model: Path) -> np.ndarray:
    from ..evaluation import encode_text
    from ..generation import load_tokenizer

    return encode_text(load_tokenizer(model), text)


def _dataset(spec: CalibrationSpec, name: str, model: Path) -> np.ndarray:
    """Documents of a data set, joined by blank lines, until there are enough tokens."""
    try:
        import datasets
    except ImportError as error:
        raise QmoeError(
            "E_MISSING",
            f"'{name}' is no file, and Hugging Face data sets need the package 'datasets': pip install datasets",
            file=name,
        ) from error
    from ..evaluation import encode_text
    from ..generation import load_tokenizer

    tokenizer, field, count = load_tokenizer(model), spec.text_field, 0
    pieces: list[np.ndarray] = []
    try:
        for row in _rows(datasets, name, spec.split):
            if count >= spec.max_tokens:
                break
            if not isinstance(row[field], str):
                found = type(row[field]).__name__
                raise QmoeError("E_VALUE", f"data set: '{field}' is no text", file=name, expected="str", actual=found)
            pieces.append(encode_text(tokenizer, row[field] + "\n\n"))
            count += len(pieces[-1])
    except QmoeError:
        raise
    except KeyError as error:  # no such split of a directory, no such field
        raise QmoeError("E_MISSING", f"the data set has no {error}", file=name) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # unknown name, no network, damaged files
        raise QmoeError("E_MISSING", f"the data set cannot be read: {error!r}", file=name) from error
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def _rows(datasets: Any, name: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set, by the package `datasets`: what `save_to_disk` has left in a directory, what its loaders
    make of other directories, or what the Hub has of that name."""
    if (Path(name) / "dataset_dict.json").is_file():
        yield from datasets.load_from_disk(name)[split]
    elif (Path(name) / "state.json").is_file():
        yield from datasets.load_from_disk(name)
    else:
        path, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
        yield from datasets.load_dataset(path, configuration or None, split=split, streaming=True)
