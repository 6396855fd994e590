"""What recovery tunes and how, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import QmoeError

# Class -> learning rate. Steps are relative: one of 0.001 moves a scale by 0.1 %, and an element of any other tensor by
# 0.001 of that tensor's root mean square, so that one number suits tensors of any size.
LEARNING_RATES = {
    "scales": 1e-2,  # scales of int, levels of ternary
    "norms": 1e-2,
    "router": 1e-2,
    "attention": 1e-2,
    "shared_expert": 1e-2,
    "dense": 1e-2,
    "embedding": 3e-3,
    "lm_head": 3e-3,
    "other": 1e-2,  # what has no other role: gates of shared experts, biases
}
# Classes of plain tensors by their role in qmoe.json (roles.py).
ROLE_CLASSES = {"norm": "norms", "expert": "other"}  # "expert": a plain tensor there is a bias
MODES = ("end-to-end", "block")
DTYPES = ("float32", "tf32", "bfloat16")


def _check(name: str, good: bool, expected: Any, actual: Any) -> None:
    if not good:
        raise QmoeError("E_VALUE", f"recovery: {name} is not supported", expected=expected, actual=actual)


@dataclass(frozen=True)
class RecoverySpec:
    """Settings of a recovery.

    Attributes:
        parameters: classes of parameters to tune, of `LEARNING_RATES`.
        mode: "end-to-end" matches the original's predictions (KL divergence); "block" matches its decoder layers'
            outputs one layer at a time, with one layer of each model in memory, for models too large for the other.
        steps: optimizer steps; in mode "block" for each layer. batch: windows per step. window: tokens per window.
        learning_rates: class -> peak learning rate, where it is not the default.
        warmup: share of the steps with a rising rate; after it the rate falls to zero along a cosine.
        average: decay of an exponential moving average of the parameters that is taken as the result; 0: the last ones.
        clip: largest norm of the gradient, longer ones are shortened. 0: no limit.
        kl_temperature: both models' logits are divided by it (mode "end-to-end").
        dtype: arithmetic of the forward passes: "float32", "tf32" (on CUDA), "bfloat16" (autocast).
        validation: windows at the end of the tokens that are not tuned on but measured before and after.
        checkpoint_every: steps after which the state becomes durable.
        seed: of the order of the windows.
    """

    parameters: tuple[str, ...] = ("scales", "norms", "router")
    mode: str = "end-to-end"
    steps: int = 400
    batch: int = 16
    window: int = 512
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.05
    average: float = 0.0
    clip: float = 1.0
    kl_temperature: float = 1.0
    dtype: str = "float32"
    validation: int = 16
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(sorted(set(self.parameters))))
        known = sorted(LEARNING_RATES)
        _check("parameters", bool(self.parameters) and set(self.parameters) <= set(known), known, self.parameters)
        _check("mode", self.mode in MODES, MODES, self.mode)
        _check("dtype", self.dtype in DTYPES, DTYPES, self.dtype)
        for name, least in (("steps", 1), ("batch", 1), ("window", 2), ("validation", 1), ("checkpoint_every", 1)):
            value = getattr(self, name)
            _check(name, isinstance(value, int) and value >= least, f"an integer of at least {least}", value)
        _check("seed", isinstance(self.seed, int) and self.seed >= 0, "an integer of at least 0", self.seed)
        _check("warmup", 0 <= self.warmup < 1, "0 to below 1", self.warmup)
        _check("average", 0 <= self.average < 1, "0 to below 1", self.average)
        _check("clip", self.clip >= 0, "at least 0", self.clip)
        _check("kl_temperature", self.kl_temperature > 0, "above 0", self.kl_temperature)
        for name, rate in self.learning_rates.items():
            _check(
                f"learning_rates[{name!r}]", name in self.parameters and 0 < rate < 1, "0 to 1, of a tuned class", rate
            )

    def rate(self, name: str) -> float:
        """The peak learning rate of a class."""
        return self.learning_rates.get(name, LEARNING_RATES[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every learning rate spelled out."""
        rates = {name: self.rate(name) for name in self.parameters}
        return {**asdict(self), "parameters": list(self.parameters), "learning_rates": rates}


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover` did.

    Attributes:
        output: the new directory.
        initial, final: the loss on the validation windows before and after: KL divergence to the original in nats per
            token, or in mode "block" the mean over layers of the squared error over the squared change that the
            original layer makes.
        losses: of the steps, at most 200 evenly spaced ones.
        tuned: class -> number of parameters.
        tokens: distinct tokens tuned on; steps: optimizer steps in all.
        bytes_on_disk, bits_per_parameter, expert_bits_per_weight: of the output, as in `CompressionReport`.
        seconds: wall time of this run; resumed: it continued an interrupted one.
    """

    output: str
    initial: float
    final: float
    losses: tuple[float, ...]
    tuned: dict[str, int]
    tokens: int
    steps: int
    bytes_on_disk: int
    bits_per_parameter: float
    expert_bits_per_weight: float | None
    seconds: float = 0.0
    resumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "losses": list(self.losses)}
