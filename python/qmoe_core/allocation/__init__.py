"""Budgeted allocation: which tensor gets which format, so that the model fits into so many bytes and loses least.

items = measure_sensitivity("MODEL", calibration_tokens)
plan = plan_fit("MODEL", parse_bytes("24GiB"), items)
compress("MODEL", "OUT", plan.recipe)
"""

from .budget import bytes_for_bits, directory_overhead, parse_bytes
from .choose import fit_recipe
from .fit import FitPlan, FrontierPoint, frontier, plan_fit, plan_recipe
from .problem import Candidate, Item
from .sensitivity import (
    DATA_FREE,
    CompressedTrials,
    SensitivityCollector,
    measure_sensitivity,
    output_energy,
    predicted_loss,
    weight_errors,
)
from .solver import Allocation, solve

__all__ = [
    "DATA_FREE",
    "Allocation",
    "Candidate",
    "CompressedTrials",
    "FitPlan",
    "FrontierPoint",
    "Item",
    "SensitivityCollector",
    "bytes_for_bits",
    "directory_overhead",
    "fit_recipe",
    "frontier",
    "measure_sensitivity",
    "output_energy",
    "parse_bytes",
    "plan_fit",
    "plan_recipe",
    "predicted_loss",
    "solve",
    "weight_errors",
]
