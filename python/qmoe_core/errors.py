"""The one exception type of the library.

Every refusal of bad input, on any layer, is a `QmoeError`; its `code` is stable and meant for programs, its text for
people.
"""

from __future__ import annotations

from typing import Any

CODES: dict[str, str] = {
    "E_TRUNCATED": "the file or section ends before its declared end",
    "E_MAGIC": "this is not a packed record or a safetensors file",
    "E_VERSION": "the version is zero or newer than this library",
    "E_UNKNOWN": "unknown format, dtype, method or flag",
    "E_LIMIT": "a count or size is over the documented limit",
    "E_OVERFLOW": "a product, sum or padding does not fit 64 bits",
    "E_OFFSET": "a gap, an overlap, wrong order or trailing bytes",
    "E_SHAPE": "size and shape contradict each other",
    "E_NAME": "a duplicate, non-UTF-8 or path-like name",
    "E_CHECKSUM": "the CRC32C does not match",
    "E_CORRUPT": "the content violates the format",
    "E_CHANGED": "the source, options or version changed since the interrupted run",
    "E_BUSY": "another process is writing this output",
    "E_SAME_FILE": "the output is the source",
    "E_UNSAFE_SOURCE": "pickle files can run code and are never opened",
    "E_NO_SPACE": "the disk is full",
    "E_IO": "an input/output error",
    "E_NO_KERNEL": "no kernel for this shape, type or device",
    "E_DTYPE": "wrong element type",
    "E_VALUE": "a value is out of range, NaN or infinite",
    "E_LAYOUT": "the model's layout is not known",
    "E_MISSING": "a file or tensor is absent",
}


class QmoeError(ValueError):
    """A typed refusal: what is wrong (`code`, one of `CODES`) and where.

    Attributes:
        code: stable identifier, e.g. `"E_TRUNCATED"`.
        message: one sentence for a person.
        file, tensor, offset: where, as far as it is known; `offset` is in bytes from the start of the file or record.
        expected, actual: the two values that disagree, where there are two.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        file: Any = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: Any = None,
        actual: Any = None,
    ) -> None:
        assert code in CODES, code
        self.code = code
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.offset = offset
        self.expected = expected
        self.actual = actual
        super().__init__(code, message)

    def __str__(self) -> str:
        where = [
            f"{label} {value}"
            for label, value in (("file", self.file), ("tensor", self.tensor), ("offset", self.offset))
            if value is not None
        ]
        text = f"{self.code}: {self.message}"
        if self.expected is not None or self.actual is not None:
            text += f" (expected {self.expected}, found {self.actual})"
        return text + (f" [{', '.join(where)}]" if where else "")

    def locate(self, *, file: Any = None, tensor: str | None = None) -> QmoeError:
        """Fill in where it happened, as it becomes known on the way up. Returns self."""
        if self.file is None and file is not None:
            self.file = str(file)
        if self.tensor is None:
            self.tensor = tensor
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.code, self.message, self.file, self.tensor, self.offset, self.expected, self.actual))


def _rebuild(code: str, message: str, file: Any, tensor: Any, offset: Any, expected: Any, actual: Any) -> QmoeError:
    return QmoeError(code, message, file=file, tensor=tensor, offset=offset, expected=expected, actual=actual)
