"""The `qmoe` command. Importing it imports neither torch nor transformers, so that `qmoe --help` answers at once."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the `qmoe` script."""
    # Every model is a local directory: asking the network about it would only cost time, or hang where there is none.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .app import app

    app(prog_name="qmoe")


__all__ = ["main"]
