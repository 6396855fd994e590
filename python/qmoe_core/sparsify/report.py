"""What pruning was asked for, and what it did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import QmoeError
from ..roles import COMPRESSIBLE
from ..source import MASKS
from .distribution import DISTRIBUTIONS
from .masks import Masks
from .methods import METHODS, prune_info
from .patterns import Pattern, Unstructured, check_sparsity


@dataclass(frozen=True)
class PruneSettings:
    """How a model is pruned.

    Attributes:
        method: "magnitude", "random", "wanda", "sparsegpt" or "alps" (`methods.METHODS`).
        pattern: text of a `Pattern`.
        sparsity: share of all pruned weights that become zero; None where the pattern fixes it.
        distribution: "uniform"; "erk"; "global" (by magnitude only). Where the pattern fixes it, "uniform".
        roles: which weights are pruned: "expert", "shared_expert", "attention", "dense".
        options: of the method.

    Example:
        >>> from qmoe_core.sparsify import PruneSettings
        >>> PruneSettings("sparsegpt", "2:4").sparsity is None
        True
    """

    method: str = "sparsegpt"
    pattern: str = "2:4"
    sparsity: float | None = None
    distribution: str = "uniform"
    roles: tuple[str, ...] = ("expert",)
    options: Mapping[str, float | int | str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `E_UNKNOWN` (method, option), `E_VALUE`."""
        info = prune_info(self.method, self.options)
        pattern = Pattern.parse(self.pattern)
        if self.distribution not in DISTRIBUTIONS:
            raise QmoeError("E_VALUE", "unknown distribution of sparsity", expected=DISTRIBUTIONS,
                            actual=self.distribution)  # fmt: skip
        if pattern.sparsity is None:
            if self.sparsity is None:
                raise QmoeError("E_VALUE", f"pattern '{pattern}' needs a sparsity")
            check_sparsity(self.sparsity)
        elif self.sparsity is not None and abs(self.sparsity - pattern.sparsity) > 1e-6:
            raise QmoeError("E_VALUE", f"pattern '{pattern}' has its own sparsity", expected=pattern.sparsity,
                            actual=self.sparsity)  # fmt: skip
        elif self.distribution != "uniform":
            raise QmoeError("E_VALUE", f"pattern '{pattern}' is the same everywhere", expected="uniform",
                            actual=self.distribution)  # fmt: skip
        if self.distribution == "global" and not (info.comparable and isinstance(pattern, Unstructured)):
            comparable = [name for name, other in METHODS.items() if other.comparable]
            raise QmoeError("E_VALUE", "a global distribution takes unstructured scores that compare between tensors",
                            expected=comparable, actual=self.method)  # fmt: skip
        if not self.roles or not set(self.roles) <= set(COMPRESSIBLE):
            raise QmoeError("E_VALUE", "these roles are not pruned", expected=COMPRESSIBLE, actual=self.roles)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "roles": list(self.roles), "options": dict(self.options)}


@dataclass(frozen=True)
class PrunedEntry:
    """One pruned weight.

    Attributes:
        name: run-time name, as in the masks. role, shape (E, N, K), pattern: of it.
        sparsity: share of zeros. relative_error: ||W - Q|| / ||W||; relative_output_error: the same of the outputs on
            the calibration tokens, where there were any.
        tokens: that each matrix saw, for calibrated methods; notes: what was done about matrices that saw few.
        sources: checkpoint tensors with the CRC32C of what was read; written: with that of what they have become.
    """

    name: str
    role: str
    shape: tuple[int, int, int]
    pattern: str
    sparsity: float
    relative_error: float
    relative_output_error: float | None
    tokens: tuple[int, ...]
    notes: Mapping[str, int]
    sources: Mapping[str, int]
    written: Mapping[str, int]

    @property
    def weights(self) -> int:
        experts, rows, columns = self.shape
        return experts * rows * columns


@dataclass(frozen=True)
class PruneReport:
    """What `prune_checkpoint` did.

    Attributes:
        output: the directory. settings: `PruneSettings.to_dict`. tensors: one entry per pruned weight.
        calibration: settings of the calibration and the SHA-256 of its tokens, or None.
        mask_bytes: size of the file of masks.
        largest_layer_bytes, start_rss_bytes, peak_rss_bytes, calibration_memory_bytes, seconds, resumed: of this run,
            as in `CompressionReport`.

    Example:
        >>> import tempfile
        >>> from qmoe_core.quickstart import example_directory
        >>> from qmoe_core.sparsify import PruneSettings, load_prune_report, prune_checkpoint
        >>> output = tempfile.mkdtemp()
        >>> _ = prune_checkpoint(example_directory(), output, PruneSettings("random", "unstructured", 0.25))
        >>> report = load_prune_report(output)
        >>> report.tensors[0].name, report.tensors[0].sparsity, report.masks().sparsity()
        ('model.layers.0.mlp.experts.down_proj', 0.25, 0.25)
    """

    output: str
    settings: dict[str, Any]
    tensors: tuple[PrunedEntry, ...]
    calibration: dict[str, Any] | None
    mask_bytes: int
    largest_layer_bytes: int = 0
    start_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    calibration_memory_bytes: int = 0
    seconds: float = 0.0
    resumed: bool = False

    @property
    def weights(self) -> int:
        """All pruned weights, kept ones included."""
        return sum(entry.weights for entry in self.tensors)

    @property
    def sparsity(self) -> float:
        """The share of them that is zero."""
        return sum(entry.sparsity * entry.weights for entry in self.tensors) / max(self.weights, 1)

    @property
    def mask_bits_per_weight(self) -> float:
        return self.mask_bytes * 8 / max(self.weights, 1)

    @property
    def rss_limit_bytes(self) -> int:
        """What is promised for `peak_rss_bytes` - `start_rss_bytes`: as for `CompressionReport`."""
        return 2 * self.largest_layer_bytes + (512 << 20) + self.calibration_memory_bytes

    def masks(self) -> Masks:
        """The masks, from the output."""
        return Masks.load(Path(self.output) / MASKS)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; properties included."""
        names = ("weights", "sparsity", "mask_bits_per_weight", "rss_limit_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def load_prune_report(directory: str | os.PathLike[str]) -> PruneReport:
    """The report of a finished pruning, from its prune.json. Raises `E_MISSING`, `E_CORRUPT`, `E_VERSION`, `E_IO`."""
    from .job import read_prune_json, report_of

    return report_of(Path(directory), read_prune_json(Path(directory)))
