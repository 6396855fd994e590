"""Budgeted allocation: which tensor gets which format, so that the model fits into so many bytes and loses least.

compress("MODEL", "OUT", Fit("24GiB"), calibration=CalibrationSpec("book.txt"))

or with losses of one's own:

plan = plan_fit("MODEL", parse_bytes("24GiB"), items)
compress("MODEL", "OUT", plan.recipe)
"""

from .budget import bytes_for_bits, directory_overhead, parse_bytes
from .choose import Fit, Planned, plan_output
from .fit import FitPlan, FrontierPoint, frontier, plan_fit, plan_recipe
from .problem import Candidate, Item
from .sensitivity import DATA_FREE, CompressedTrials, measure_sensitivity, weight_errors
from .solver import Allocation, solve
from .streamed import CALIBRATED, measure_streamed, streamed_losses

__all__ = [
    "CALIBRATED",
    "DATA_FREE",
    "Allocation",
    "Candidate",
    "CompressedTrials",
    "Fit",
    "FitPlan",
    "FrontierPoint",
    "Item",
    "Planned",
    "bytes_for_bits",
    "directory_overhead",
    "frontier",
    "measure_sensitivity",
    "measure_streamed",
    "parse_bytes",
    "plan_fit",
    "plan_output",
    "plan_recipe",
    "solve",
    "streamed_losses",
    "weight_errors",
]
