"""Scaling laws for sparse models (Frantar et al., arXiv 2309.08520): what loss a sparsity, a size and an amount of data
lead to, and which sparsity is best for a budget.

Needs numpy only; plots are in `scaling_plots`, the command is `qmoe scaling`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import QmoeError
from .scaling_fit import Residual, Runs, minimize

Cost = Literal["dense", "gradual"]
Array = NDArray[np.float64]
FLOPS = 6.0  # of training, per parameter and token: 2 forward, 4 backward


@dataclass(frozen=True)
class ScalingLaw:
    """L(S, N, D) = (a_s (1 - S)^b_s + c_s) N^-b_n + (a_d / D)^b_d + c.

    S is the sparsity, in [0, 1); N the number of parameters that are *not* zero, without embeddings; D the amount of
    training data, in tokens (examples for `vit`). L is what was fitted: cross-entropy in nats per token for `t5`, the
    validation loss of JFT-4B for `vit`. All methods take scalars and arrays, which broadcast, and give float64 back.

    Source: arXiv 2309.08520. Raises QmoeError (E_VALUE) for coefficients that are not positive and finite,
    and for arguments outside of their ranges.

    >>> law = ScalingLaw.t5()
    >>> round(law.predict(0.75, 604e6, 500_000 * 65_536), 3)
    1.468
    >>> round(law.gain(0.75), 2)  # a model 75 % sparse is as good as a dense one of 2.16 times its nonzeros
    2.16
    """

    a_s: float
    b_s: float
    c_s: float
    b_n: float
    a_d: float
    b_d: float
    c: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < np.inf:
                raise QmoeError("E_VALUE", f"coefficient {name} is positive and finite", tensor=name, actual=value)

    @classmethod
    def t5(cls) -> ScalingLaw:
        """T5 on C4: N from 1.3 M to 85 M, D from 16 to 66 billion tokens, S up to 7/8.

        As published, with D from steps of 128 windows of 512 tokens. Other coefficients fit the 48 runs better
        (`fit` finds them) and extrapolate worse: 1.9 % too low on the 604 M run that was held out, these 1.0 %.
        """
        published = (0.56778512, 0.72161276, 1.52265016, 0.24513173, 0.63361517, 0.20270772, 0.65074219)
        return cls._from_units(published, nonzero=1e6, data=1e5 * 128 * 512)

    @classmethod
    def vit(cls) -> ScalingLaw:
        """ViT on JFT-4B: N from 0.7 M to 42 M, D from 225 M to 1.8 billion *images*, S up to 15/16. As published."""
        published = (1.30485411, 0.82101251, 2.07506343, 0.39222675, 0.27818217, 0.88979104, 4.51669257)
        return cls._from_units(published, nonzero=1e6, data=1e9)

    @classmethod
    def _from_units(cls, published: tuple[float, ...], nonzero: float, data: float) -> ScalingLaw:
        """From (a (1-S)^b + c) N^-d + e D^-f + g with N and D in these units."""
        a, b, c, d, e, f, g = published
        return cls(a * nonzero**d, b, c * nonzero**d, d, data * e ** (1 / f), f, g)

    @classmethod
    def fit(
        cls,
        S: ArrayLike,
        N: ArrayLike,
        D: ArrayLike,
        L: ArrayLike,
        *,
        residual: Residual = "log",
        delta: float = 1e-3,
        starts: int = 25,
        bootstrap: int = 200,
        seed: int = 0,
    ) -> ScalingFit:
        """Fits the law to finished runs, one entry per run, shape (runs,) each.

        Minimizes the mean Huber loss of residuals of log L with delta 0.001, which the paper uses for language;
        for vision it uses `residual="linear", delta=0.01`. Three or more levels of S, N and D are needed.

        Args:
            starts: random starts, as the objective has several minima.
            bootstrap: repetitions with randomly weighted runs, for intervals; 0 for none.
            seed: of starts and repetitions.

        Raises:
            QmoeError: E_SHAPE, E_VALUE or E_UNKNOWN; see `Runs`.
        """
        runs = Runs.of(S, N, D, L)
        value, theta, samples, objectives = minimize(
            runs, residual, delta, starts=starts, bootstrap=bootstrap, seed=seed
        )
        laws = [cls(*map(float, row)) for row in np.exp(np.vstack((theta, samples)))]
        return ScalingFit(laws[0], tuple(laws[1:]), value, objectives, runs, residual, delta)

    def predict(self, S: ArrayLike, N: ArrayLike, D: ArrayLike) -> Any:
        """The loss at sparsity S, with N nonzero parameters, after D tokens."""
        s, n, d = _sparsity(S), _positive("N", N), _positive("D", D)
        return _plain(self._capacity(s) * n**-self.b_n + (self.a_d / d) ** self.b_d + self.c)

    def gain(self, S: ArrayLike) -> Any:
        """How many times as large a dense model of the same loss is, counted in nonzero parameters. It depends neither
        on N nor on D, and stays below its limit for S -> 1, ((a_s + c_s) / c_s)^(1/b_n)."""
        return _plain((self._capacity(np.zeros(())) / self._capacity(_sparsity(S))) ** (1 / self.b_n))

    def dense_equivalent(self, S: ArrayLike, N: ArrayLike) -> Any:
        """Parameters of the dense model that reaches the same loss on the same data: N gain(S)."""
        return _plain(_positive("N", N) * self.gain(S))

    def data_for(self, S: ArrayLike, N: ArrayLike, C: ArrayLike, cost: Cost = "dense", *, flops: float = FLOPS) -> Any:
        """How much data training compute of C FLOPs pays for; see `optimal_sparsity`. In the law's unit of D."""
        multiplier = _COSTS[_cost(cost)](_sparsity(S))
        return _plain(_positive("C", C) / (_positive("flops", flops) * _positive("N", N) * multiplier))

    def optimal_sparsity(self, N: ArrayLike, C: ArrayLike, cost: Cost = "dense", *, flops: float = FLOPS) -> Any:
        """The sparsity of least loss for N nonzero parameters and training compute of C FLOPs. In [0, 1).

        More sparsity makes a better model of N nonzeros but costs more per token, as training passes through denser
        models. A token costs `flops` times N times

        - "dense": 1 / (1 - S), as if all of training were dense. Has a closed form.
        - "gradual": (0.25 + 0.5 (1 - 0.75 S)) / (1 - S) + 0.25, with weights that are zero costing nothing: a quarter
          of training dense, half on the cubic schedule, whose mean density is 1 - 0.75 S, a quarter sparse. Searched.

        Args:
            flops: per parameter and unit of data: 6 for tokens; for images 6 times the tokens of one.

        >>> law = ScalingLaw.t5()
        >>> [round(float(s), 3) for s in law.optimal_sparsity(85e6, [1e20, 1e21])]
        [0.56, 0.735]
        """
        n, c = np.broadcast_arrays(_positive("N", N), _positive("C", C))
        _positive("flops", flops)
        if _cost(cost) == "gradual":
            return _plain(self._search(n, c, cost, flops))
        exponent = self.b_d + self.b_s
        # dL/dS = 0 with D = C (1 - S) / (flops N); powers are taken as logarithms, as C alone overflows nothing so.
        log_density = (
            np.log(self.b_d / (self.a_s * self.b_s))
            + self.b_n * np.log(n)
            + self.b_d * (np.log(flops * self.a_d) + np.log(n) - np.log(c))
        ) / exponent
        return _plain(np.clip(-np.expm1(log_density), 0.0, np.nextafter(1.0, 0.0)))

    def _capacity(self, s: Array) -> Array:
        return self.a_s * (1 - s) ** self.b_s + self.c_s

    def _search(self, n: Array, c: Array, cost: Cost, flops: float) -> Array:
        """Zooms in on the least loss over log density, from 0 to -20, on a grid of 201 points each time."""
        low, high = np.full(n.shape, -20.0), np.zeros(n.shape)
        steps = np.linspace(0, 1, 201).reshape(-1, *(1,) * n.ndim)
        for _ in range(8):
            grid = low + steps * (high - low)
            s = np.minimum(-np.expm1(grid), np.nextafter(1.0, 0.0))
            losses = self.predict(s, n, self.data_for(s, n, c, cost, flops=flops))
            best = np.take_along_axis(grid, np.argmin(losses, axis=0)[None], axis=0)[0]
            reach = (high - low) / 100  # two points to either side
            low, high = np.maximum(best - reach, -20.0), np.minimum(best + reach, 0.0)
        return np.asarray(np.abs(np.expm1(best)), np.float64)  # not -0.0


@dataclass(frozen=True)
class ScalingFit:
    """A law, and how well the runs determine it.

    Attributes:
        law: the best fit.
        samples: laws of the bootstrap's repetitions.
        objective: mean Huber loss at the best fit; `objectives` those of every start, ascending, shape (starts,): if
            few of them agree, more starts may find a better minimum.
        runs, residual, delta: what was fitted, and how.

    >>> import numpy as np
    >>> S, N, D = (x.ravel() for x in np.meshgrid([0, 0.5, 0.75], [1e7, 1e8, 1e9], [1e9, 1e10, 1e11]))
    >>> L = ScalingLaw.t5().predict(S, N, D) * np.exp(np.random.default_rng(0).normal(0, 0.001, S.size))
    >>> fit = ScalingLaw.fit(S, N, D, L, bootstrap=100)
    >>> low, high = fit.interval(lambda law: law.gain(0.75))
    >>> bool(low < ScalingLaw.t5().gain(0.75) < high)
    True
    """

    law: ScalingLaw
    samples: tuple[ScalingLaw, ...]
    objective: float
    objectives: Array = field(repr=False)
    runs: Runs = field(repr=False)
    residual: Residual = "log"
    delta: float = 1e-3

    def interval(self, quantity: Callable[[ScalingLaw], ArrayLike], level: float = 0.9) -> tuple[Any, Any]:
        """Percentiles of anything that can be said of a law, e.g. `lambda law: law.optimal_sparsity(1e9, 1e22)`.

        Raises:
            QmoeError: E_MISSING if the fit was made without repetitions; E_VALUE for a level outside (0, 1).
        """
        if not self.samples:
            raise QmoeError("E_MISSING", "intervals need a fit with bootstrap > 0")
        if not 0 < level < 1:
            raise QmoeError("E_VALUE", "level is between 0 and 1", actual=level)
        values = np.array([quantity(law) for law in self.samples], np.float64)
        low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2), axis=0)
        return _plain(low), _plain(high)

    @property
    def errors(self) -> Array:
        """Predicted over measured loss, minus 1, of every run. (runs,)"""
        runs = self.runs
        predicted: Array = self.law.predict(runs.sparsity, runs.nonzero, runs.data)
        return predicted / runs.loss - 1


def save_law(path: str | os.PathLike[str], law: ScalingLaw) -> None:
    """Writes the coefficients as JSON; `load_law` reads them."""
    Path(path).write_text(json.dumps(asdict(law), indent=1) + "\n", encoding="utf-8")


def load_law(path: str | os.PathLike[str]) -> ScalingLaw:
    """Reads a law of `save_law`.

    Raises:
        QmoeError: E_CORRUPT if it is not the JSON of seven coefficients.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, Mapping):
            raise TypeError("not an object")
        return ScalingLaw(**{name: float(value) for name, value in values.items()})
    except QmoeError as error:
        raise error.locate(file=path) from None
    except (TypeError, ValueError) as error:  # not UTF-8, not JSON, not these coefficients
        raise QmoeError("E_CORRUPT", f"this is not a scaling law: {error}", file=path) from error


def _gradual(s: Array) -> Array:
    return (0.25 + 0.5 * (1 - 0.75 * s)) / (1 - s) + 0.25


_COSTS: dict[str, Callable[[Array], Array]] = {"dense": lambda s: 1 / (1 - s), "gradual": _gradual}


def _cost(name: str) -> str:
    if name not in _COSTS:
        raise QmoeError("E_UNKNOWN", f"no cost of training '{name}'", expected=sorted(_COSTS))
    return name


def _sparsity(values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if not bool(np.all((array >= 0) & (array < 1))):  # false for NaN too
        raise QmoeError("E_VALUE", "sparsity is in [0, 1)", tensor="S")
    return array


def _positive(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if not bool(np.all((array > 0) & (array < np.inf))):
        raise QmoeError("E_VALUE", f"{name} is positive and finite", tensor=name)
    return array


def _plain(values: Any) -> Any:
    """A float for what has no dimensions."""
    array = np.asarray(values, np.float64)
    return float(array) if array.ndim == 0 else array
