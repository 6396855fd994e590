"""What `qmoe compress --fit` and `--bits` do: losses by the best means at hand, then the recipe for the budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..calibration import CalibrationSpec
from ..calibration.spec import tokens_for
from ..errors import QmoeError
from ..quantize import METHODS
from ..recipe import Rule
from ..roles import COMPRESSIBLE
from ..source import SourceCheckpoint
from .budget import bytes_for_bits, parameters, parse_bytes
from .fit import FitPlan, plan_fit
from .sensitivity import DATA_FREE, Progress, Settings, measure_sensitivity, weight_errors

SENSITIVITY_TOKENS = 4096


def fit_recipe(
    source: str | os.PathLike[str],
    *,
    size: str | int | None = None,
    bits: float | None = None,
    allow: Sequence[str] = (),
    calibration: CalibrationSpec | None = None,
    candidates: Sequence[Settings] | None = None,
    progress: Progress | None = None,
) -> FitPlan:
    """Finds the recipe of least predicted loss for a budget.

    With calibration, candidates of int formats are made by "gptq", and losses are measured on the first
    `SENSITIVITY_TOKENS` of its tokens (with data-free rounding, which ranks formats alike), provided that the model in
    float32 takes no more than half of this machine's memory; else losses are the relative errors of the weights.
    `FitPlan.basis` says which. Ternary candidates are data-free in either case: only of those is the size known before.

    Args:
        source: the checkpoint.
        size: bytes of the whole output directory, as `parse_bytes` reads them; or
        bits: all its bits per parameter. Exactly one of the two.
        allow: roles besides "expert" that may be compressed too ("shared_expert", "attention", "dense"); each tensor of
            them may also stay as it is.
        calibration: as for `compress`, which must then get the same.
        candidates: settings of recipe rules to choose from.

    Raises:
        QmoeError: `E_VALUE` (not one budget, too small a budget, roles), or as `measure_sensitivity`.
    """
    if (size is None) == (bits is None):
        raise QmoeError("E_VALUE", "allocation: give either a size or bits per parameter")
    for role in allow:
        if role not in COMPRESSIBLE:
            raise QmoeError("E_VALUE", "allocation: unknown role", expected=list(COMPRESSIBLE), actual=role)
    source = Path(source)
    with SourceCheckpoint(source) as checkpoint:
        budget = parse_bytes(size) if size is not None else bytes_for_bits(bits or 0.0, checkpoint)
        measurable = 4 * parameters(checkpoint) <= _memory() // 2
    roles = tuple(dict.fromkeys(("expert", *allow)))
    if candidates is None:
        candidates = DATA_FREE if calibration is None else calibrated(DATA_FREE)
        candidates = (*candidates, {"format": "keep"})
    needs = any(_needs_statistics(settings) for settings in candidates)
    if calibration is not None and measurable:
        tokens = tokens_for(source, calibration)
        items = measure_sensitivity(
            source, tokens, candidates, roles=roles, window=calibration.window, max_tokens=SENSITIVITY_TOKENS,
            progress=progress,
        )  # fmt: skip
    else:
        items = weight_errors(source, candidates, roles=roles, progress=progress)
    plan = plan_fit(source, budget, items, calibrated=needs)
    return replace(plan, basis="measured" if calibration is not None and measurable else "weights")


def calibrated(candidates: Sequence[Settings]) -> tuple[Settings, ...]:
    """The candidates with "gptq" for int formats below 8 bits, where rounding to nearest is not already good enough."""
    return tuple(
        {**settings, "method": "gptq"} if settings["format"] in ("int2", "int3", "int4") else settings
        for settings in candidates
    )


def _needs_statistics(settings: Settings) -> bool:
    spec = Rule.make(**settings).spec
    return spec is not None and METHODS[spec.method].needs_statistics


def _memory() -> int:
    """Bytes of this machine's memory. Not of what is free: the same command must decide alike when it continues."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
