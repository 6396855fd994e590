"""The CUDA library against the CPU's scalar decoder, bit for bit: every format, ragged shapes, garbage payloads, guard
zones."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(1, 1), (5, 7), (33, 129), (64, 256), (136, 768), (17, 4096), (300, 2080)]
GUARD = 64


def int_record(
    bits: int,
    group: int,
    zero_point: bool,
    rows: int,
    cols: int,
    scale_dtype: str = "float16",
    half_step: bool = False,
    experts: int = 2,
) -> PackedTensor:
    """Random matrices, all of them the same."""
    weight = np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(np.float32)
    codes, scales, zeros = _C.rtn_int(weight, bits, group, zero_point, scale_dtype, half_step)
    format = IntFormat(bits, group, zero_point, scale_dtype, half_step)
    return PackedTensor.pack([IntMatrix(format, codes, scales, zeros)] * experts)


def ternary_record(zeros: float, levels: int, rows: int, cols: int) -> PackedTensor:
    rng = np.random.default_rng(rows * cols)
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, cols), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    values = rng.integers(1, 128, (rows, levels)).astype(np.float32) / 64
    if levels == 2:
        values[:, 0] *= -1
    matrix = TernaryMatrix(TernaryFormat("pair" if levels == 2 else "symmetric"), trits, values)
    return PackedTensor.pack([matrix, matrix])


def decode_on_gpu(data: np.ndarray, shape: tuple[int, int], expert: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) decoded into a NaN-poisoned buffer between two guard zones that must stay poisoned."""
    device = torch.from_numpy(np.ascontiguousarray(data)).cuda()
    size = shape[0] * shape[1]
    out = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device="cuda")
    spec = _C.inspect_record(data)["specs"][_C.inspect_record(data)["entries"][expert]["spec"]]
    record, table = _C.CudaRecord(data), None
    if spec["format"] == "ternary":
        table = torch.from_numpy(record.table(expert).view(np.int32)).cuda()
    record.dequantize(
        expert,
        device.data_ptr(),
        0 if table is None else table.data_ptr(),
        out.data_ptr() + GUARD * out.element_size(),
        str(dtype).removeprefix("torch."),
        torch.cuda.current_stream().cuda_stream,
    )
    torch.cuda.synchronize()
    assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "wrote outside the output"
    return out[GUARD:-GUARD].view(shape)


def assert_equals_cpu(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> None:
    for expert in range(packed.experts):
        expected = torch.from_numpy(_C.decode_record(packed.data, expert)).to(dtype)
        first = decode_on_gpu(packed.data, (packed.rows, packed.cols), expert, dtype)
        again = decode_on_gpu(packed.data, (packed.rows, packed.cols), expert, dtype)
        assert torch.equal(first.cpu(), expected)
        assert torch.equal(first, again)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [0, 16, 32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("half_step", [False, True])
def test_int_equals_cpu(bits: int, group: int, zero_point: bool, half_step: bool, shape: tuple[int, int]) -> None:
    assert_equals_cpu(int_record(bits, group, zero_point, *shape, half_step=half_step))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_int_scale_types(scale_dtype: str) -> None:
    assert_equals_cpu(int_record(4, 64, True, 37, 200, scale_dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("zeros", [0.0, 0.42, 0.6, 0.885, 0.95, 1.0])
def test_ternary_equals_cpu(zeros: float, levels: int, shape: tuple[int, int]) -> None:
    assert_equals_cpu(ternary_record(zeros, levels, *shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_types(dtype: torch.dtype) -> None:
    assert_equals_cpu(ternary_record(0.885, 2, 64, 256), dtype)
    assert_equals_cpu(int_record(4, 128, True, 64, 256), dtype)


def scramble(packed: PackedTensor, rng: np.random.Generator, header_bytes: int) -> np.ndarray:
    """The record with every payload word of expert 0 replaced by noise and the checksums made right again."""
    data = packed.data.copy()
    entry = packed.info["entries"][0]
    begin, end = entry["offset"] + header_bytes, entry["offset"] + entry["bytes"]
    # The last 16 bytes may be padding, which must stay zero.
    data[begin : end - 16] = rng.integers(0, 256, max(0, end - 16 - begin), dtype=np.uint8)
    specs, experts = len(packed.info["specs"]), packed.experts
    head = 64 + 80 * specs + 16 * experts
    struct.pack_into("<I", data, 64 + 80 * specs + 12, _C.crc32c(data[entry["offset"] : end]))
    struct.pack_into("<I", data, 40, 0)
    struct.pack_into("<I", data, 40, _C.crc32c(data[:head]))
    return data


def test_garbage_payloads_decode_in_bounds_and_as_on_the_cpu() -> None:
    rng = np.random.default_rng(7)
    for zeros in (0.42, 0.885, 0.95):
        packed = ternary_record(zeros, 2, 40, 192)
        spec = packed.info["specs"][0]
        blocks = -(-40 // (32 // spec["segments"] * spec["rows_per_lane"]))
        level_bytes = sum(-(-40 * bits // 8) for bits in spec["level_bits"])
        tables = -(-level_bytes // 4) * 4 + (blocks + 1) * 4
        for _ in range(100):
            data = scramble(packed, rng, tables)
            expected = torch.from_numpy(_C.decode_record(data, 0))
            assert torch.equal(decode_on_gpu(data, (40, 192), 0, torch.float32).cpu(), expected)


def test_refusals() -> None:
    packed = int_record(4, 128, True, 5, 7)
    out = torch.empty(35, device="cuda")
    with pytest.raises(QmoeError) as error:
        _C.CudaRecord(packed.data).dequantize(0, out.data_ptr(), 0, out.data_ptr(), "int8", 0)
    assert error.value.code == "E_DTYPE"
    ternary = ternary_record(0.8, 2, 5, 7)
    with pytest.raises(QmoeError) as error:
        _C.CudaRecord(ternary.data).dequantize(0, out.data_ptr(), 0, out.data_ptr(), "float32", 0)
    assert error.value.code == "E_MISSING"


def test_info() -> None:
    info = _C.cuda_info()
    assert info["library"] and info["devices"][0]["compute_capability"] >= 80
