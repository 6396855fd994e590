"""Light recovery after compression: scales, levels, norms and routers tuned to the original model's predictions.

Codes, zero points and trits stay as they are, so the recovered checkpoint has the layout and practically the size of
the compressed one. Scale-only tuning is known to win back much of what two bits lose; routers are worth tuning because
they were trained for other experts.
"""

from .job import recover
from .spec import LEARNING_RATES, RecoveryReport, RecoverySpec

__all__ = ["LEARNING_RATES", "RecoveryReport", "RecoverySpec", "recover"]
