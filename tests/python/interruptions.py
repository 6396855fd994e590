"""Runs that are killed on the way."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch


def killed(run: Any, point: int, action: str) -> bool:
    """Runs `run` in a child that kills itself at its `point`-th call of os.`action`; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            count, real = 0, getattr(os, action)

            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            setattr(os, action, call)
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
