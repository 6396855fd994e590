"""Writes the CPU kernels of one instruction set: python generate.py ISA FILE. Run by CMake; needs Python alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from codegen.emit import emit
from codegen.isa import ISAS


def main() -> None:
    name, path = sys.argv[1], Path(sys.argv[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(emit(ISAS[name]))


if __name__ == "__main__":
    main()
