"""Results of benchmarks as lines of Markdown: a function for each kind, by subject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import compression, cpu, gpu, sparsity

# By what a file of results calls its benchmark.
RENDERERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    **compression.RENDERERS,
    **cpu.RENDERERS,
    **gpu.RENDERERS,
    **sparsity.RENDERERS,
}
