"""What every benchmark writes beside its numbers: device, date, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The CPU's own name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        name = match[1]
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Short hash of HEAD, with "+changes" when tracked sources differ from it, or "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "cpp", "cuda", "python", ":!*.md")
    return head + ("+changes" if changes else "") or "unknown"


def command() -> str:
    """This process's command line; absolute paths outside the repository are cut to their last part."""

    def readable(word: str) -> str:
        if not os.path.isabs(word):
            return word
        return os.path.relpath(word, ROOT) if Path(word).is_relative_to(ROOT) else os.path.basename(word)

    words = ["python", os.path.relpath(Path(sys.argv[0]).resolve(), ROOT), *map(readable, sys.argv[1:])]
    return shlex.join(words)


def write_results(
    path: Path, benchmark: str, rows: list[dict[str, Any]], device: str | None = None, **extra: Any
) -> None:
    """Write {benchmark, device, date, commit, command, ..., rows} as JSON."""
    result = {
        "benchmark": benchmark,
        "device": device or processor(),
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("QMOE_BENCH_COMMIT") or commit(),
        "command": command(),
        **extra,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
