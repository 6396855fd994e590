"""What an error behind a layer does to the predictions, measured while the original model streams by.

Some windows run along in copies, one for every layer that is probed. Each copy is disturbed once, behind its layer, by
noise of a small share of the activations' energy, and from there on runs through all layers behind like any other
window. At the end the KL divergence of its predictions from those of the undisturbed windows, over that share, is the
layer's gain: nats per token for an error as large as the activations, as far as errors are small enough to add up.

The noise is made of what the layer itself adds to the activations, but of other tokens and with random signs: errors of
a layer's weights point into the same directions. Isotropic noise underestimates the first and the last layers by half.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

SHARE = 0.01  # of the activations' energy
PROBED = 16  # layers at most; gains of those between are interpolated
TOKENS = 1024  # per probe, about
SLICE = 64  # tokens whose predictions are in memory together


class Probes:
    """The disturbed copies.

    Attributes:
        windows: how many windows are copied: the first ones. start: number of the first copy.
        layers: the layers that are probed; copy number c is that of window c % windows behind layers[c // windows].
    """

    def __init__(self, count: int, ids: torch.Tensor) -> None:
        """`count`: of all layers. `ids`: (windows, window) without copies."""
        self.count, self.start = count, len(ids)
        self.windows = min(len(ids), max(1, TOKENS // ids.shape[1]))
        probed = min(count, PROBED)
        self.layers = sorted({round(place * (count - 1) / max(1, probed - 1)) for place in range(probed)})

    def extended(self, ids: torch.Tensor) -> torch.Tensor:
        """The windows with the copies behind them."""
        return torch.cat([ids, ids[: self.windows].repeat(len(self.layers), 1)])

    def disturb(self, layer: int, first: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Disturbs what copies of this layer's there are among windows from `first` on; `before`, `after`: (n, window,
        ...) float32, the layer's inputs and outputs, of which the latter change in place."""
        for place in range(len(after)):
            copy = first + place - self.start
            if copy < 0 or self.layers[copy // self.windows] != layer:
                continue
            generator = torch.Generator().manual_seed(copy)
            added = after[place] - before[place].to(after)
            order = torch.randperm(len(added), generator=generator)
            signs = torch.randint(0, 2, (len(added), *[1] * (added.ndim - 1)), generator=generator) * 2 - 1
            noise = added[order.to(after.device)] * signs.to(after)
            energy = noise.square().mean()
            if energy > 0:
                after[place] += noise * (SHARE * after[place].square().mean() / energy).sqrt()

    def gains(
        self,
        read: Callable[[int], torch.Tensor],
        predict: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[float]:
        """Nats per token for an error of the activations' own energy behind every layer.

        Args:
            read: the last layer's output (window, ...) by number of the window.
            predict: logits (n, vocabulary) float32 of some of its tokens.
        """
        sums, tokens = [0.0] * len(self.layers), 0
        for window in range(self.windows):
            clean = read(window)
            copies = [read(self.start + probe * self.windows + window) for probe in range(len(self.layers))]
            for first in range(0, len(clean), SLICE):
                part = slice(first, first + SLICE)
                expected = predict(clean[part]).log_softmax(-1)
                for probe, copy in enumerate(copies):
                    found = predict(copy[part]).log_softmax(-1)
                    divergence = (expected.exp() * (expected - found)).sum(dtype=torch.float64)
                    sums[probe] += float(divergence)
            tokens += len(clean)
        logs = [math.log(max(value / tokens / SHARE, 1e-9)) for value in sums]
        return np.exp(np.interp(range(self.count), self.layers, logs)).tolist()
