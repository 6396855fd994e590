"""What long operations tell whoever watches: one event type for all of them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProgressEvent:
    """One step of progress.

    Attributes:
        stage: what is being done, e.g. "evaluate".
        done, total: how much of it, in the unit that `detail` names or, where that is a tensor's name, in bytes.
        detail: the unit or the name of what was just finished.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
