"""The refusal table, as Python sees it: files and records crafted byte by byte, each refused with the exact code.

Refusals that concern conversions and not files (E_CHANGED, E_BUSY, E_SAME_FILE, E_UNSAFE_SOURCE, E_NO_SPACE) are tested
with the checkpoint writer; the C++ suites test more of each row than is repeated here.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_core import _C
from qmoe_core.errors import QmoeError
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix

HEADER, SPEC, ENTRY = 64, 80, 16


def refusal(action: Callable[[], Any]) -> QmoeError:
    with pytest.raises(QmoeError) as caught:
        action()
    return caught.value


# --- safetensors -----------------------------------------------------------------------------------------------------


def write(path: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def tensors(**entries: tuple[str, list[int], list[int]]) -> str:
    return json.dumps(
        {name: dict(zip(("dtype", "shape", "data_offsets"), e, strict=True)) for name, e in entries.items()}
    )


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., QmoeError]:
    """Writes a safetensors file and returns how it is refused."""

    def attempt(header: str | bytes, data: bytes = b"", length: int | None = None) -> QmoeError:
        path = write(tmp_path / "model.safetensors", header, data, length)
        error = refusal(lambda: _C.SafetensorsFile(path))
        assert error.file == str(path)
        return error

    return attempt


Refused = Callable[..., QmoeError]


def test_sound_file_is_read(tmp_path: Path) -> None:
    header = tensors(b=("U8", [2, 2], [2, 6]), a=("BF16", [1], [0, 2]), empty=("F32", [0, 3], [6, 6]))
    path = write(tmp_path / "x", header, b"abcdef")
    with _C.SafetensorsFile(path) as file:
        begin = 8 + len(header)
        assert list(file.tensors.items()) == [
            ("a", ("BF16", (1,), begin, begin + 2)),
            ("b", ("U8", (2, 2), begin + 2, begin + 6)),
            ("empty", ("F32", (0, 3), begin + 6, begin + 6)),
        ]
        assert file.metadata == {}
        assert file.read("b").tobytes() == b"cdef"
        assert file.read_range("b", 1, 2).tobytes() == b"de"
        assert file.read("empty").size == 0


@pytest.mark.parametrize("size", range(8))
def test_truncated_safetensors_of_0_to_7_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\1" * size)
    error = refusal(lambda: _C.SafetensorsFile(str(path)))
    assert (error.code, error.expected, error.actual) == ("E_TRUNCATED", 8, size)


def test_truncated_safetensors_at_every_length(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", tensors(w=("U8", [4], [0, 4])), b"abcd").read_bytes()
    for size in range(len(whole)):
        path = tmp_path / "part"
        path.write_bytes(whole[:size])
        assert refusal(lambda: _C.SafetensorsFile(tmp_path / "part")).code == "E_TRUNCATED"


def test_truncated_safetensors_names_the_tensor(refused: Refused) -> None:
    error = refused(tensors(a=("U8", [2], [0, 2]), b=("U8", [4], [2, 6])), b"abcd")
    assert (error.code, error.tensor, error.expected, error.actual) == ("E_TRUNCATED", "b", 6, 4)


def test_magic_of_pickle_zip_and_text(tmp_path: Path) -> None:
    for content in (
        pickle.dumps({"w": [1.0] * 99}),
        b"PK\3\4" + bytes(99),
        b"not a checkpoint",
        bytes(8),
        struct.pack("<Q", 2) + b"[]",
    ):
        path = tmp_path / "x"
        path.write_bytes(content)
        assert refusal(lambda: _C.SafetensorsFile(tmp_path / "x")).code == "E_MAGIC"


def test_unknown_dtype_and_field(refused: Refused) -> None:
    assert refused(tensors(w=("Q4_0", [4], [0, 4])), b"abcd").code == "E_UNKNOWN"
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "codec": "zip"}
    assert refused(json.dumps({"w": entry}), b"abcd").code == "E_UNKNOWN"


def test_limit_of_header(refused: Refused) -> None:
    error = refused("{}", length=(16 << 20) + 1)
    assert (error.code, error.expected, error.actual) == ("E_LIMIT", 16 << 20, (16 << 20) + 1)
    assert refused("{}", length=2**64 - 1).code == "E_LIMIT"


def test_limit_of_rank(refused: Refused) -> None:
    error = refused(tensors(w=("U8", [1, 1, 1, 1, 4], [0, 4])), b"abcd")
    assert (error.code, error.tensor) == ("E_LIMIT", "w")


def test_limit_of_name(refused: Refused) -> None:
    assert refused(tensors(**{"n" * 513: ("U8", [4], [0, 4])}), b"abcd").code == "E_LIMIT"


def test_overflow_of_product_and_number(refused: Refused) -> None:
    assert refused(tensors(w=("U8", [2**32, 2**32], [0, 4])), b"abcd").code == "E_OVERFLOW"
    assert refused(tensors(w=("F64", [2**60], [0, 4])), b"abcd").code == "E_OVERFLOW"
    assert refused(tensors(w=("U8", [2**64], [0, 4])), b"abcd").code == "E_OVERFLOW"


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        ([0, 4], [5, 9], 9),
        ([0, 4], [3, 7], 7),
        ([0, 4], [0, 4], 4),
        ([4, 0], [4, 8], 8),
        ([1, 5], [5, 9], 9),
        ([0, 4], [4, 8], 9),
    ],
    ids=["gap", "overlap", "same bytes", "reversed", "bytes before", "trailing bytes"],
)
def test_offsets(refused: Refused, first: list[int], second: list[int], size: int) -> None:
    assert refused(tensors(a=("U8", [4], first), b=("U8", [4], second)), bytes(size)).code == "E_OFFSET"


def test_shape_against_size(refused: Refused) -> None:
    error = refused(tensors(w=("F32", [3], [0, 4])), b"abcd")
    assert (error.code, error.tensor, error.expected, error.actual) == ("E_SHAPE", "w", 12, 4)


@pytest.mark.parametrize("name", ["", "../w", "/etc/passwd", "a/b", "a\\b", "..", "a\0b", "a\nb", "\x1b[2J"])
def test_path_like_name(refused: Refused, name: str) -> None:
    assert refused(tensors(**{name: ("U8", [4], [0, 4])}), b"abcd").code == "E_NAME"


@pytest.mark.parametrize("raw", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\\ud800"])
def test_name_that_is_no_utf8(refused: Refused, raw: bytes) -> None:
    header = tensors(NAME=("U8", [4], [0, 4])).encode().replace(b"NAME", raw)
    assert refused(header, b"abcd").code == "E_NAME"


def test_duplicate_name(refused: Refused) -> None:
    one = tensors(w=("U8", [4], [0, 4]))[1:-1]
    error = refused("{" + one + "," + one.replace("[0, 4]", "[4, 8]").replace('"w"', '"\\u0077"') + "}", bytes(8))
    assert (error.code, error.tensor) == ("E_NAME", "w")


@pytest.mark.parametrize(
    "header", ["{", '{"w":1}', '{"w":{}}', "{} x", '{"__metadata__":{"a":1}}', "{" * 50, '{"w":{"shape":[-1]}}']
)
def test_malformed_header(refused: Refused, header: str) -> None:
    assert refused(header).code == "E_CORRUPT"


def test_hostile_headers_cost_at_most_64_mib(tmp_path: Path) -> None:
    """The longest headers that the limits admit, of as many entries as fit, each refused only at their last byte."""
    many = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}}' for i in range(240_000))
    metadata = '"__metadata__":{' + ",".join(f'"{i:x}":"{"v" * 200}"' for i in range(65_536)) + "}"
    for number, body in enumerate((many, metadata, f'"{"n" * ((16 << 20) - 20)}":', "[" * ((16 << 20) - 1))):
        header = ("{" + body)[: 16 << 20]
        assert len(header) > 13 << 20
        write(tmp_path / str(number), header)
        program = f"""
import resource
from qmoe_core import _C
from qmoe_core.errors import QmoeError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    _C.SafetensorsFile({str(tmp_path / str(number))!r})
except QmoeError as error:
    print(error.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        found, kib = result.stdout.split()
        assert found in ("E_CORRUPT", "E_LIMIT")
        assert int(kib) <= 64 << 10, number


def test_missing_file_and_tensor(tmp_path: Path) -> None:
    assert refusal(lambda: _C.SafetensorsFile(tmp_path / "absent")).code == "E_MISSING"
    file = _C.SafetensorsFile(write(tmp_path / "x", "{}"))
    error = refusal(lambda: file.read("w"))
    assert (error.code, error.tensor) == ("E_MISSING", "w")


def test_io_of_directory_pipe_closed_and_shrunk_file(tmp_path: Path) -> None:
    assert refusal(lambda: _C.SafetensorsFile(tmp_path)).code == "E_IO"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(lambda: _C.SafetensorsFile(tmp_path / "pipe")).code == "E_IO"
    path = write(tmp_path / "x", tensors(w=("U8", [9000], [0, 9000])), bytes(9000))
    file = _C.SafetensorsFile(path)
    os.truncate(path, 4000)
    error = refusal(lambda: file.read("w"))
    assert (error.code, error.tensor, error.offset) == ("E_IO", "w", 4000)
    file.close()
    assert refusal(lambda: file.read("w")).code == "E_IO"


def test_value_of_range(tmp_path: Path) -> None:
    file = _C.SafetensorsFile(write(tmp_path / "x", tensors(w=("U8", [4], [0, 4])), b"abcd"))
    for begin, count in ((0, 5), (5, 0), (3, 2), (1, 2**64 - 1)):
        assert refusal(lambda b=begin, c=count: file.read_range("w", b, c)).code == "E_VALUE"


# --- packed records --------------------------------------------------------------------------------------------------


def int_record() -> bytearray:
    """Two experts (3, 40) of int4-g32: one spec."""
    random = np.random.default_rng(0)
    matrices = [
        IntMatrix(
            IntFormat(4, 32),
            random.integers(0, 16, (3, 40), dtype=np.uint8),
            np.full((3, 2), 0.5, np.float32),
            random.integers(0, 16, (3, 2), dtype=np.uint8),
        )
        for _ in range(2)
    ]
    return bytearray(PackedTensor.pack(matrices).data.tobytes())


def ternary_record() -> bytearray:
    random = np.random.default_rng(1)
    trits = random.choice(np.array([-1, 0, 1], np.int8), (40, 70), p=[0.1, 0.8, 0.1])
    levels = np.tile(np.array([[-0.5, 0.75]], np.float32), (40, 1))
    return bytearray(PackedTensor.pack([TernaryMatrix(TernaryFormat(), trits, levels)]).data.tobytes())


def crc(data: bytes | bytearray) -> int:
    return int(_C.crc32c(np.frombuffer(bytes(data), np.uint8)))


def repair(record: bytearray) -> bytearray:
    """Put the checksums right, so that what they would hide is reached."""
    experts, specs = struct.unpack_from("<II", record, 8)
    entries = HEADER + specs * SPEC
    end = entries + experts * ENTRY
    if end > len(record):
        return record
    offsets = [struct.unpack_from("<Q", record, entries + ENTRY * e)[0] for e in range(experts)] + [len(record)]
    for e in range(experts):
        if offsets[e] <= offsets[e + 1] <= len(record):
            struct.pack_into("<I", record, entries + ENTRY * e + 12, crc(record[offsets[e] : offsets[e + 1]]))
    struct.pack_into("<I", record, 40, 0)
    struct.pack_into("<I", record, 40, crc(record[:end]))
    return record


def code(record: bytes | bytearray, verify: bool = False) -> str:
    return refusal(lambda: _C.inspect_record(np.frombuffer(bytes(record), np.uint8), verify)).code


def patched(record: bytearray, layout: str, at: int, value: int) -> str:
    struct.pack_into(layout, record, at, value)
    return code(repair(record))


def test_sound_records_are_read() -> None:
    for record in (int_record(), ternary_record()):
        assert _C.inspect_record(np.frombuffer(bytes(repair(record)), np.uint8), True)["version"] == 1


@pytest.mark.parametrize("make", [int_record, ternary_record])
def test_truncated_record_at_every_length(make: Callable[[], bytearray]) -> None:
    record = make()
    assert {code(record[:size]) for size in range(len(record))} == {"E_TRUNCATED"}


def test_record_magic_and_version() -> None:
    assert patched(int_record(), "<I", 0, 0) == "E_MAGIC"
    assert patched(int_record(), "<H", 4, 0) == "E_VERSION"
    assert patched(int_record(), "<H", 4, 2) == "E_VERSION"


def test_record_unknown_format_flag_and_parameter() -> None:
    assert patched(int_record(), "<H", 6, 1) == "E_UNKNOWN"
    assert patched(int_record(), "<H", HEADER, 99) == "E_UNKNOWN"
    assert patched(int_record(), "<B", HEADER + 2, 5) == "E_UNKNOWN"
    assert patched(int_record(), "<B", HEADER + 4, 4) == "E_UNKNOWN"
    assert patched(int_record(), "<I", HEADER + 8, 8) == "E_UNKNOWN"
    assert patched(ternary_record(), "<B", HEADER + 3, 3) == "E_UNKNOWN"


def test_record_limits() -> None:
    assert patched(int_record(), "<I", 8, 2**32 - 1) == "E_LIMIT"
    assert patched(int_record(), "<I", 12, 3) == "E_LIMIT"
    assert patched(int_record(), "<Q", 16, 2**24 + 1) == "E_LIMIT"
    assert patched(int_record(), "<Q", 24, 2**64 - 1) == "E_LIMIT"
    assert patched(ternary_record(), "<H", HEADER + 4, 4096) == "E_LIMIT"


def test_record_offsets() -> None:
    entries = HEADER + SPEC
    first = struct.unpack_from("<Q", int_record(), entries)[0]
    assert patched(int_record(), "<Q", entries, first + 16) == "E_OFFSET"
    assert patched(int_record(), "<Q", entries + ENTRY, first) == "E_OFFSET"
    assert patched(int_record(), "<Q", entries + ENTRY, 2**64 - 16) == "E_OFFSET"
    assert code(int_record() + b"\0") == "E_OFFSET"


def test_record_shape() -> None:
    assert patched(int_record(), "<Q", 16, 4) == "E_SHAPE"
    assert patched(int_record(), "<I", 8, 0) == "E_SHAPE"


def test_record_checksum_and_offset() -> None:
    record = int_record()
    at = struct.unpack_from("<Q", record, HEADER + SPEC + ENTRY)[0]
    record[at] ^= 1
    error = refusal(lambda: PackedTensor(np.frombuffer(bytes(record), np.uint8)))
    assert (error.code, error.offset) == ("E_CHECKSUM", at)
    record = int_record()
    record[16] ^= 1  # rows
    assert code(record) == "E_CHECKSUM"


def test_every_bit_flip_is_refused() -> None:
    for make in (int_record, ternary_record):
        record = make()
        for bit in range(0, len(record) * 8, 3):
            record[bit // 8] ^= 1 << bit % 8
            code(record)
            record[bit // 8] ^= 1 << bit % 8


def test_record_corrupt_scale_table_and_stream() -> None:
    record = int_record()
    data = struct.unpack_from("<Q", record, HEADER + SPEC)[0]
    assert (
        patched(record, "<H", data + 3 * 2 * 16, 0x7C00) == "E_CORRUPT"
    )  # float16 infinity, behind 3 rows of 2 blocks
    record = int_record()
    record[data + 16 + 15] = 0x11  # codes 15 and 31 of a block of which 8 are columns
    assert code(repair(record), verify=True) == "E_CORRUPT"
    record = ternary_record()
    record[-24] ^= 0x55
    assert code(repair(record), verify=True) == "E_CORRUPT"


def test_dtype_shape_and_value_of_arguments() -> None:
    codes = np.zeros((2, 32), np.uint8)
    scales = np.ones((2, 1), np.float32)
    fields: dict[str, Any] = {"format": "int", "bits": 4, "group": 32, "scale_dtype": "float16", "zeros": None}
    build = lambda **change: _C.build_record(2, 32, [{**fields, "codes": codes, "scales": scales, **change}])  # noqa: E731
    assert build().dtype == np.uint8
    assert refusal(lambda: build(codes=codes.astype(np.int32))).code == "E_DTYPE"
    assert refusal(lambda: build(codes=codes[0])).code == "E_SHAPE"
    assert refusal(lambda: build(scales=np.ones((2, 2), np.float32))).code == "E_SHAPE"
    assert refusal(lambda: build(codes=codes + 16)).code == "E_VALUE"
    assert refusal(lambda: build(scales=scales * np.inf)).code == "E_VALUE"
    assert refusal(lambda: build(bits=5)).code == "E_UNKNOWN"
    assert refusal(lambda: build(format="zip")).code == "E_UNKNOWN"
    assert refusal(lambda: _C.rtn_int(np.full((2, 32), np.nan, np.float32), 4, 32)).code == "E_VALUE"
    assert refusal(lambda: _C.rtn_int(np.zeros((2, 32)), 4, 32)).code == "E_DTYPE"
    record = PackedTensor(build())
    assert refusal(lambda: record.decode(1)).code == "E_VALUE"
    assert refusal(lambda: record.slice_experts(0, 2)).code == "E_VALUE"


def test_no_kernel_for_a_forced_instruction_set() -> None:
    """A pinned instruction set that is not there is refused, never replaced by another one."""
    program = """
import numpy as np
from qmoe_core import _C
from qmoe_core.errors import QmoeError
matrix = {"format": "int", "bits": 4, "group": 32, "scale_dtype": "float16", "zeros": None,
          "codes": np.zeros((2, 32), np.uint8), "scales": np.ones((2, 1), np.float32)}
record = _C.build_record(2, 32, [matrix])
x, y, offsets = np.ones((1, 32), np.float32), np.ones((1, 2), np.float32), np.array([0, 1], np.int64)
try:
    _C.linear(record.ctypes.data, record.nbytes, offsets.ctypes.data, 2, x.ctypes.data, "float32", 1, 32,
              y.ctypes.data, 2, 1)
except QmoeError as error:
    print(error.code)
"""
    environment = {**os.environ, "QMOE_FORCE_ISA": "abacus"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.strip() == "E_NO_KERNEL"
