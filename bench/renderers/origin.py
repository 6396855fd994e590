"""What all tables say of where their numbers come from."""

from __future__ import annotations

from typing import Any


def origin(result: dict[str, Any]) -> str:
    """Where the numbers come from, in one sentence."""
    return f"{result['device']}, {result['date']}, commit {result['commit']}, `{result['command']}`."
