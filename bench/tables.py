"""Writes the README's tables from the JSON files in bench/results, between markers.

    python bench/tables.py            # rewrite README.md
    python bench/tables.py --check    # exit code 1 if README.md is stale

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A marker without a file, or a file that no marker
uses, is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def quality(result: dict[str, Any]) -> list[str]:
    """Formats of one model against the original (bench/compression/quality.py)."""
    lines = [
        "| experts stored as | bits per expert weight | bits per parameter | perplexity | KL divergence "
        "| same top token | same experts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        sizes = f"{row['bits_per_expert_weight']:.3f} | {row['bits_per_parameter']:.3f}"
        perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}"
        if row["name"] == "original":
            lines.append(f"| original (bfloat16) | {sizes} | {perplexity} | | | |")
            continue
        kl = f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        shares = f"{row['top1_agreement']:.1%} | {row['router_agreement']:.1%}"
        lines.append(f"| {row['name']} | {sizes} | {perplexity} | {kl} | {shares} |")
    first = result["rows"][0]
    lines += [
        "",
        f"{result['model']}, {first['windows']} windows of {first['window']} tokens, {result['dtype']}, "
        f"± one standard error clustered by window. {result['device']}, {result['date']}, "
        f"commit {result['commit']}, `{result['command']}`.",
    ]
    return lines


RENDERERS = {"quality": quality}


def render(readme: str, results: Path) -> str:
    """The README with all tables made anew. ValueError for a marker without a file and a file without a marker."""
    used = set()

    def table(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise ValueError(f"README.md wants a table from {path.name}, which is not in {results.name}")
        used.add(path.stem)
        result = json.loads(path.read_text(encoding="utf-8"))
        return match[1] + "\n".join(RENDERERS[result["benchmark"]](result)) + "\n" + match[3]

    text = MARKER.sub(table, readme)
    unused = sorted(
        path.name
        for path in results.glob("*.json")
        if path.stem not in used and json.loads(path.read_text(encoding="utf-8")).get("benchmark") in RENDERERS
    )
    if unused:
        raise ValueError(f"no table in README.md shows {', '.join(unused)}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if README.md is stale")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    try:
        new = render(old, ROOT / "bench" / "results")
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    if check:
        if new != old:
            print("tables: README.md is stale: run python bench/tables.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
