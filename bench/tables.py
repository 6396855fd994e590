"""Writes the tables of README.md and cpp/FORMAT.md from the JSON files in bench/results, between markers.

    python bench/tables.py            # rewrite them
    python bench/tables.py --check    # exit code 1 if one is stale

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A marker without a file, or a file that no marker
uses, is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from renderers import RENDERERS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "cpp/FORMAT.md")
MARKER = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def render(results: Path) -> dict[Path, tuple[str, str]]:
    """Every document as it is and as it should be. Raises ValueError for a marker without a file and the reverse."""
    used = set()

    def table(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise ValueError(f"a table wants {path.name}, which is not in {results.name}")
        used.add(path.stem)
        result = json.loads(path.read_text(encoding="utf-8"))
        return match[1] + "\n".join(RENDERERS[result["benchmark"]](result)) + "\n" + match[3]

    texts = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    rendered = {path: (text, MARKER.sub(table, text)) for path, text in texts.items()}
    unused = sorted(path.name for path in results.glob("*.json") if path.stem not in used)
    if unused:
        raise ValueError(f"no table shows {', '.join(unused)}")
    return rendered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is stale")
    check = parser.parse_args().check
    try:
        documents = render(ROOT / "bench" / "results")
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    stale = {path: new for path, (old, new) in documents.items() if new != old}
    for path, new in stale.items():
        if check:
            print(f"tables: {path.name} is stale: run python bench/tables.py", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
