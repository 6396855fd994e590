"""What all commands share: exit codes, one-line errors, JSON on stdout, tables, progress bars on stderr."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ..errors import QmoeError
from ..progress import ProgressEvent

PIPE_WIDTH = 140  # of tables where stdout is no terminal: wide enough for tensor names


class ExitCode(enum.IntEnum):
    """What the exit status of every command means."""

    OK = 0
    UNEXPECTED = 1  # a bug in this program, most likely
    USAGE = 2  # the command line is wrong
    REFUSED = 3  # the input was refused: see the error's code
    FAILED = 4  # verify found something wrong
    IO = 5  # input/output error, or no space left
    BUSY = 6  # another process is writing the same output
    NOT_INSTALLED = 7  # a package that this command needs is not installed
    INTERRUPTED = 130  # Ctrl-C; `qmoe compress` continues where it stopped


EXIT_HELP = (
    "Exit codes: 0 ok, 1 unexpected error, 2 wrong usage, 3 input refused, 4 verification failed, "
    "5 input/output error or no space, 6 output busy, 7 a needed package is not installed, 130 interrupted."
)

_BY_ERROR = {"E_IO": ExitCode.IO, "E_NO_SPACE": ExitCode.IO, "E_BUSY": ExitCode.BUSY}
_FIELDS = ("code", "message", "file", "tensor", "offset", "expected", "actual")
_OPTIONAL = ("torch", "transformers", "matplotlib", "jinja2")


class UsageError(Exception):
    """The options make no sense, alone or together; the text says why."""


class Output:
    """Where a command's results go: JSON or text on stdout, everything else on stderr; nowhere with `quiet`."""

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json and not quiet, quiet
        self.console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, quiet=quiet)
        self.errors = Console(stderr=True, highlight=False, quiet=quiet)

    def show(self, *items: Any) -> None:
        """Prints for people; nothing with --json."""
        if not self.as_json:
            self.console.print(*items)

    def write(self, text: str) -> None:
        """Text as it is (a model's words are not markup), without a line end; nothing with --json."""
        if not (self.as_json or self.quiet):
            sys.stdout.write(text)
            sys.stdout.flush()

    def result(self, value: dict[str, Any]) -> None:
        """The result for programs; nothing without --json."""
        if self.as_json:
            sys.stdout.write(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[ProgressEvent], None]]:
        """A sink for progress events, one bar per stage with amount, speed, elapsed time and time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        )
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self.errors, disable=self.quiet or not self.errors.is_terminal) as bar:

            def sink(event: ProgressEvent) -> None:
                unit = event.detail if event.detail in ("windows", "tokens") else "bytes"
                if event.stage not in tasks:
                    tasks[event.stage] = bar.add_task(event.stage, total=event.total, unit=unit, detail="")
                detail = event.detail if unit == "bytes" and event.done < event.total else ""
                bar.update(tasks[event.stage], completed=event.done, total=event.total, detail=detail)

            yield sink


class _Amount(ProgressColumn):
    """Done and total in the task's unit, with the speed where the unit is bytes."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        if task.fields["unit"] != "bytes":
            return Text(f"{int(task.completed):,}/{total:,} {task.fields['unit']}")
        speed = f" {filesize.decimal(int(task.speed))}/s" if task.speed else ""
        return Text(f"{filesize.decimal(int(task.completed))}/{filesize.decimal(total)}{speed}")


@contextlib.contextmanager
def reporting(context: typer.Context, as_json: bool, quiet: bool = False) -> Iterator[Output]:
    """Runs the body of a command: errors become one line on stderr, JSON on stdout with --json, and an exit code; only
    the latter with `quiet`."""
    out = Output(as_json, quiet)
    debug = bool(context.find_root().params.get("debug"))
    try:
        yield out
    except QmoeError as error:
        fields = {key: getattr(error, key) for key in _FIELDS}
        _fail(out, _BY_ERROR.get(error.code, ExitCode.REFUSED), str(error), fields, error, debug)
    except UsageError as error:
        _fail(out, ExitCode.USAGE, str(error), {"code": "USAGE", "message": str(error)}, error, debug)
    except KeyboardInterrupt as error:
        _fail(out, ExitCode.INTERRUPTED, "interrupted", {"code": "INTERRUPTED"}, error, False)
    except BrokenPipeError:
        raise  # the reader of our stdout went away; that is for the shell to know
    except OSError as error:
        _fail(out, ExitCode.IO, f"E_IO: {error}", {"code": "E_IO", "message": str(error)}, error, debug)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _OPTIONAL:
            _unexpected(out, error, debug)
        text = f"this needs {error.name}, which is not installed: pip install 'qmoe-core[models]'"
        _fail(out, ExitCode.NOT_INSTALLED, text, {"code": "NOT_INSTALLED", "message": text}, error, debug)
    except typer.Exit:
        raise
    except Exception as error:
        _unexpected(out, error, debug)


def _unexpected(out: Output, error: Exception, debug: bool) -> None:
    text = f"unexpected {type(error).__name__}: {error}"
    hint = "" if debug else " (qmoe --debug ... shows where)"
    _fail(out, ExitCode.UNEXPECTED, text + hint, {"code": "UNEXPECTED", "message": text}, error, debug)


def _fail(out: Output, code: ExitCode, text: str, fields: dict[str, Any], error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    out.result({"error": fields, "exit_code": int(code)})
    line = " ".join(text.split())  # one line, whatever a file name or another library's message holds
    if not out.quiet:
        sys.stderr.write(f"qmoe: error: {line}\n")
    raise typer.Exit(int(code)) from error


def _plain(value: Any) -> Any:
    """JSON has neither infinity nor NaN: both become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
