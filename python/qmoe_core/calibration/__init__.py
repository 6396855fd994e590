"""Calibrated compression: the model runs layer by layer on calibration text, and each layer is quantized with what it
saw. `pipeline.py` has the order of things."""

from .spec import CalibrationSpec

__all__ = ["CalibrationSpec"]
