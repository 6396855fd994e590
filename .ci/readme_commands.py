"""Prints one of the README's commands, word for word: its first `sh` block installs and runs, its second tests.

python3 .ci/readme_commands.py NUMBER      (from 1)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    print(blocks[int(sys.argv[1]) - 1].strip())


if __name__ == "__main__":
    main()
