"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="How many tokens of it to use.", min=2, show_default="131072")
]
CalibrationWindow = Annotated[int | None, typer.Option(help="Tokens per disjoint window.", min=2, show_default="512")]
