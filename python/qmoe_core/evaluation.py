"""How much quality a compressed model lost: perplexity, KL divergence, top-1 and routing agreement, standard errors.

Conventions, so that numbers can be compared:
- The first `max_tokens` tokens are cut into disjoint windows of `window` tokens; a partial last window is dropped. No
  token is added to a window. Each window predicts `window - 1` tokens: its first token has no context.
- For an encoder-decoder model the first half of each window goes to the encoder and every token of the second half is
  predicted.
- nll is the mean over all predicted tokens, in nats; perplexity = exp(nll).
- kl is the mean over predicted tokens of KL(reference || model) over the vocabulary, in nats.
- top1_agreement is the share of predicted tokens where both models rank the same token first.
- router_agreement is the mean over all tokens and all routers of |A and B| / max(|A|, |B|), the sets of experts chosen.
- Tokens of one window depend on each other, so standard errors are clustered by window. perplexity_se = perplexity *
  nll_se.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import QmoeError
from .progress import ProgressEvent
from .runtime.routing import agreement, record_routing

Routes = dict[str, list[torch.Tensor]]

# Logits of one model for one batch stay below this; two models and their log-softmax are held at a time.
LOGIT_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured; the conventions are in the module's docstring. None where there was no reference to
    compare with, and for standard errors of fewer than two windows."""

    perplexity: float
    perplexity_se: float | None
    nll: float
    nll_se: float | None
    kl: float | None
    kl_se: float | None
    top1_agreement: float | None
    top1_se: float | None
    router_agreement: float | None
    router_se: float | None
    tokens: int  # predicted tokens
    windows: int
    window: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class ClusterMean:
    """Ratio of sums over windows with its cluster-robust standard error."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.counts: list[int] = []

    def add(self, values: torch.Tensor) -> None:
        """`values`: (windows, n), one row per window."""
        self.sums += values.double().sum(-1).tolist()
        self.counts += [values.shape[-1]] * values.shape[0]

    def mean(self) -> float | None:
        return math.fsum(self.sums) / sum(self.counts) if sum(self.counts) else None

    def se(self) -> float | None:
        clusters, mean = len(self.sums), self.mean()
        if clusters < 2 or mean is None:
            return None
        squares = math.fsum((s - mean * n) ** 2 for s, n in zip(self.sums, self.counts, strict=True))
        return math.sqrt(squares * clusters / (clusters - 1)) / sum(self.counts)


def read_ids(path: Path) -> np.ndarray:
    """Token ids from a .npy file, mapped; never pickled ones. Raises `E_MISSING`, `E_CORRUPT`."""
    if not path.exists():
        raise QmoeError("E_MISSING", "no such file", file=path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise QmoeError("E_CORRUPT", f"not a .npy file of numbers: {error}", file=path) from error


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """`text` as token ids, int64 1-D, with no special tokens added.

    Args:
        tokenizer: a transformers tokenizer, or a directory that `AutoTokenizer` can open.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    # verbose=False: a text longer than the context is cut into windows later and deserves no warning.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def evaluate(
    model: Any,
    tokens: np.ndarray,
    *,
    reference: Any = None,
    window: int = 512,
    max_tokens: int = 65536,
    batch_size: int = 8,
    progress: Callable[[Any], None] | None = None,
) -> EvalResult:
    """Measure `model` on `tokens`, and against `reference` where one is given.

    Both models see the same batch one after the other, so memory is the two models plus the logits of one batch each;
    the batch shrinks by itself where the vocabulary is large. Results depend on the models' dtype: load in float32 for
    the numbers in the README.

    Args:
        model, reference: transformers models, or checkpoint directories (loaded in float32).
        tokens: (n,) integer token ids.
        window: tokens per window, at least 2.
        max_tokens: how many tokens of the front to use.
        batch_size: windows per forward pass.
        progress: called with a `ProgressEvent` (stage "evaluate", windows done and in total) after each batch.

    Raises:
        QmoeError: E_VALUE where there is less than one window, an id is outside the vocabulary, or the logits are not
            finite; E_SHAPE where the two models' vocabularies or routers differ.
    """
    return evaluate_all(
        {"model": model},
        tokens,
        reference=reference,
        window=window,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=progress,
    )["model"]


def evaluate_all(
    models: Mapping[str, Any],
    tokens: np.ndarray,
    *,
    reference: Any = None,
    window: int = 512,
    max_tokens: int = 65536,
    batch_size: int = 8,
    progress: Callable[[Any], None] | None = None,
) -> dict[str, EvalResult]:
    """Measure several models of one vocabulary side by side: like `evaluate` for each, but the reference, often the
    slowest of them, runs once per batch for all. All models are in memory together.

    Args:
        models: name -> model or checkpoint directory.
        progress: counts windows of all models together.
        (others): as for `evaluate`.

    Returns:
        name -> result; `seconds` of each is the time in that model alone.
    """
    if not models:
        raise QmoeError("E_VALUE", "no model to evaluate")
    loaded = {name: _loaded(model) for name, model in models.items()}
    reference = None if reference is None else _loaded(reference)
    vocabulary = min(model.config.get_text_config(decoder=True).vocab_size for model in loaded.values())
    ids = _windows(tokens, window, max_tokens, vocabulary)
    if batch_size < 1:
        raise QmoeError("E_VALUE", "batch_size must be at least 1", actual=batch_size)
    batch_size = min(batch_size, max(1, LOGIT_BYTES // (4 * ids.shape[1] * vocabulary)))
    scores = {name: _Scores() for name in loaded}
    done, total = 0, len(ids) * len(loaded)
    with ExitStack() as stack:
        for model in (*loaded.values(), reference):
            stack.enter_context(_evaluating(model))
        stack.enter_context(torch.inference_mode())
        for begin in range(0, len(ids), batch_size):
            batch = ids[begin : begin + batch_size]
            expected = None if reference is None else _predict(reference, batch)
            for name, model in loaded.items():
                scores[name].add(model, batch, begin, expected)
                done += len(batch)
                if progress is not None:
                    progress(ProgressEvent("evaluate", done, total, "windows"))
    return {name: score.result(ids) for name, score in scores.items()}


class _Scores:
    """Everything measured of one model, batch by batch."""

    def __init__(self) -> None:
        self.nll, self.kl, self.top1, self.router = ClusterMean(), ClusterMean(), ClusterMean(), ClusterMean()
        self.seconds = 0.0

    def add(
        self, model: Any, batch: torch.Tensor, begin: int, expected: tuple[torch.Tensor, torch.Tensor, Routes] | None
    ) -> None:
        """`batch`: the ids (B, window) of the windows from `begin` on; `expected`: what the reference predicts."""
        started = time.perf_counter()
        logp, targets, routes = _predict(model, batch)
        self.seconds += time.perf_counter() - started
        losses = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if not bool(torch.isfinite(losses).all()):
            raise QmoeError("E_VALUE", "the model's logits are not finite", actual=f"a window from {begin} on")
        self.nll.add(losses)
        if expected is None:
            return
        ref_logp, _, ref_routes = expected
        if ref_logp.shape != logp.shape:
            raise QmoeError("E_SHAPE", "vocabularies differ", expected=ref_logp.shape[-1], actual=logp.shape[-1])
        self.top1.add((ref_logp.argmax(-1) == logp.argmax(-1)).double())
        # In place: at a large vocabulary these are the largest tensors of the whole evaluation.
        self.kl.add(logp.neg_().add_(ref_logp).mul_(ref_logp.exp()).sum(-1))
        self.router.add(_route_agreement(ref_routes, routes, len(batch)))

    def result(self, ids: torch.Tensor) -> EvalResult:
        mean, se = self.nll.mean(), self.nll.se()
        assert mean is not None
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return EvalResult(
            perplexity=perplexity,
            perplexity_se=None if se is None else perplexity * se,
            nll=mean,
            nll_se=se,
            kl=self.kl.mean(),
            kl_se=self.kl.se(),
            top1_agreement=self.top1.mean(),
            top1_se=self.top1.se(),
            router_agreement=self.router.mean(),
            router_se=self.router.se(),
            tokens=sum(self.nll.counts),
            windows=len(ids),
            window=ids.shape[1],
            seconds=self.seconds,
        )


def _loaded(model: Any) -> Any:
    if isinstance(model, (str, os.PathLike)):
        from .generation import load_model

        return load_model(model, dtype=torch.float32)
    return model


def _windows(tokens: np.ndarray, window: int, max_tokens: int, vocabulary: int) -> torch.Tensor:
    """(windows, window) int64 ids of the disjoint full windows."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise QmoeError("E_VALUE", "tokens must be 1-D integers", actual=f"{tokens.ndim}-D {tokens.dtype}")
    if window < 2:
        raise QmoeError("E_VALUE", "a window needs at least 2 tokens", expected=">= 2", actual=window)
    tokens = tokens[: max(0, max_tokens)]
    count = len(tokens) // window
    if count == 0:
        raise QmoeError("E_VALUE", "not one full window of tokens", expected=f">= {window}", actual=len(tokens))
    tokens = tokens[: count * window]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise QmoeError(
            "E_VALUE", "token id outside the vocabulary", expected=f"0..{vocabulary - 1}", actual=(low, high)
        )
    return torch.from_numpy(tokens.astype(np.int64)).view(count, window)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout, no router jitter) for the block."""
    if model is None:
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _predict(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routes]:
    """float32 log-probabilities (B, P, V) of the P predicted tokens, those tokens (B, P), and the routers' choices."""
    batch = batch.to(model.device)
    with record_routing(model) as routes:
        if getattr(model.config, "is_encoder_decoder", False):
            half = batch.shape[1] // 2
            targets = batch[:, half:].contiguous()
            decoder_ids = model.prepare_decoder_input_ids_from_labels(targets)
            logits = model(input_ids=batch[:, :half], decoder_input_ids=decoder_ids, use_cache=False).logits
        else:
            targets = batch[:, 1:]
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1, dtype=torch.float32), targets, routes


def _route_agreement(reference: Routes, other: Routes, windows: int) -> torch.Tensor:
    """(windows, tokens x routers) shares of experts chosen by both; zero columns for a model without routers."""
    if {n: [m.shape for m in masks] for n, masks in reference.items()} != {
        n: [m.shape for m in masks] for n, masks in other.items()
    }:
        raise QmoeError("E_SHAPE", "routers differ", expected=sorted(reference), actual=sorted(other))
    shares = [
        agreement(a, b).view(windows, -1)
        for name, masks in reference.items()
        for a, b in zip(masks, other[name], strict=True)
    ]
    return torch.cat(shares, dim=1) if shares else torch.empty(windows, 0)
