"""The torch ops: right values, every refusal, and the rules of torch.library."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from packed_fixtures import pack, unpack

from qmoe_core.errors import QmoeError
from qmoe_core.runtime import ops

# Relative to the largest output: one rounding of the output type, and float32 accumulation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def record(
    experts: int, rows: int, cols: int, bits: int = 4, group: int = 32, half_step: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes and the decoded weights (E, N, K) in float64."""
    generator = torch.Generator().manual_seed(experts * 1000003 + rows * 1009 + cols)
    packed = pack(torch.randn(experts, rows, cols, generator=generator), bits=bits, group=group, half_step=half_step)
    return torch.from_numpy(packed.data), unpack(packed).double()


def reference(x: torch.Tensor, weight: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        out[begin:end] = x[begin:end].double() @ weight[expert].T
    return out


@pytest.fixture
def poisoned():
    """Every torch.empty is filled with NaN, so that an output element that a kernel forgets is seen."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 128), (4, 0), (3, 64), (2, 32), (2, 16)])
@pytest.mark.parametrize("half_step", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 33), (40, 96), (65, 130), (16, 257)])
@pytest.mark.parametrize("compute", ["float", "stored", "int8"])
def test_grouped_linear_matches_float64(poisoned, compute, dtype, bits, group, half_step, rows, cols):
    packed, weight = record(4, rows, cols, bits, group, half_step)
    offsets = [2, 3, 3, 12, 20]  # rows before, an expert without rows, one row, several rows, rows after
    x = torch.randn(23, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = ops.grouped_linear(x, packed, torch.tensor(offsets), rows, compute)
    expected = reference(x, weight, offsets)
    assert out.dtype == dtype and out.shape == (23, rows)
    assert not out[:2].any() and not out[20:].any()
    error = out.double() - expected
    if compute == "int8":
        assert error.norm() <= (1e-2 + TOLERANCE[dtype]) * expected.norm()
    else:
        assert error.abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


def test_two_runs_and_any_thread_count_are_bitwise_equal():
    packed, _ = record(6, 48, 320)
    x = torch.randn(50, 320)
    offsets = torch.tensor([0, 1, 1, 9, 20, 47, 50])
    first = ops.grouped_linear(x, packed, offsets, 48)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.grouped_linear(x, packed, offsets, 48), first)
    finally:
        torch.set_num_threads(threads)


def test_no_tokens_gives_an_empty_output():
    packed, _ = record(3, 8, 32)
    out = ops.grouped_linear(torch.empty(0, 32), packed, torch.zeros(4, dtype=torch.int64), 8)
    assert out.shape == (0, 8)
    assert ops.linear(torch.empty(2, 0, 32), record(1, 8, 32)[0], 8).shape == (2, 0, 8)


def test_activations_need_not_be_contiguous():
    packed, weight = record(1, 24, 40)
    x = torch.randn(40, 6).T
    assert not x.is_contiguous()
    torch.testing.assert_close(ops.linear(x, packed, 24).double(), x.double() @ weight[0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40)])
def test_linear_keeps_leading_dimensions(poisoned, shape):
    packed, weight = record(1, 24, 40)
    x = torch.randn(shape)
    torch.testing.assert_close(ops.linear(x, packed, 24).double(), x.double() @ weight[0].T, rtol=1e-5, atol=1e-5)


def test_dequantize_is_the_reference_decoder():
    packed, weight = record(3, 17, 45)
    for expert in range(3):
        assert torch.equal(ops.dequantize(packed, expert, 17, 45, torch.float32).double(), weight[expert])
    assert torch.equal(ops.dequantize(packed, 1, 17, 45, torch.bfloat16), weight[1].to(torch.bfloat16))


def test_gradient_of_the_activations():
    packed, weight = record(3, 12, 33)
    offsets = [1, 4, 4, 6]
    x = torch.randn(7, 33, requires_grad=True)
    ops.grouped_linear(x, packed, torch.tensor(offsets), 12).square().sum().backward()
    twin = x.detach().double().requires_grad_()
    parts = [twin[b:e] @ weight[i].T for i, (b, e) in enumerate(pairwise(offsets))]
    torch.cat(parts).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)

    single, one = record(1, 12, 33)
    y = torch.randn(2, 3, 33, requires_grad=True)
    ops.linear(y, single, 12).sum().backward()
    expected = one[0].sum(0).float().expand(2, 3, 33)
    torch.testing.assert_close(y.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    packed, _ = record(3, 12, 33)
    x = torch.randn(5, 33, requires_grad=requires_grad)
    offsets = torch.tensor([0, 2, 2, 5])
    torch.library.opcheck(torch.ops.qmoe.grouped_linear.default, (x, packed, offsets, 12))
    torch.library.opcheck(torch.ops.qmoe.linear.default, (x, record(1, 12, 33)[0], 12))
    torch.library.opcheck(torch.ops.qmoe.dequantize.default, (packed, 1, 12, 33, torch.float32))
    torch.library.opcheck(torch.ops.qmoe.grouped_linear_backward.default, (torch.randn(5, 12), packed, offsets, 33))


def refused(code: str, call, *args) -> QmoeError:
    with pytest.raises(QmoeError) as caught:
        call(*args)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_refusals_of_arguments():
    packed, _ = record(2, 8, 32)
    x, offsets = torch.randn(3, 32), torch.tensor([0, 1, 3])
    grouped = ops.grouped_linear
    refused("E_DTYPE", grouped, x.double(), packed, offsets, 8)
    refused("E_DTYPE", grouped, x.to(torch.int32), packed, offsets, 8)
    refused("E_DTYPE", grouped, x, packed.to(torch.int8), offsets, 8)
    refused("E_DTYPE", grouped, x, packed, offsets.to(torch.int32), 8)
    refused("E_SHAPE", grouped, x[0], packed, offsets, 8)
    refused("E_SHAPE", grouped, x, packed[None], offsets, 8)
    refused("E_SHAPE", grouped, x, packed, offsets[None], 8)
    refused("E_SHAPE", grouped, x, packed, offsets[:2], 8)
    refused("E_SHAPE", grouped, x[:, :31], packed, offsets, 8)
    refused("E_SHAPE", grouped, x, packed, offsets, 9)
    refused("E_SHAPE", ops.linear, x, packed, 8)  # two matrices are no linear layer
    refused("E_SHAPE", ops.dequantize, packed, 0, 8, 31, torch.float32)
    refused("E_VALUE", ops.dequantize, packed, 2, 8, 32, torch.float32)
    refused("E_VALUE", ops.dequantize, packed, -1, 8, 32, torch.float32)
    refused("E_VALUE", grouped, x.to("meta"), packed, offsets, 8)


@pytest.mark.parametrize("offsets", [[0, 1, 4], [-1, 1, 3], [0, 2, 1], [3, 1, 3], [0, 2**62, 3]])
def test_refusals_of_offsets(offsets):
    packed, _ = record(2, 8, 32)
    refused("E_VALUE", ops.grouped_linear, torch.randn(3, 32), packed, torch.tensor(offsets), 8)


def test_refusals_of_damaged_records():
    packed, _ = record(2, 8, 32)
    x, offsets = torch.randn(3, 32), torch.tensor([0, 1, 3])
    broken = packed.clone()
    broken[0] ^= 1
    refused("E_MAGIC", ops.grouped_linear, x, broken, offsets, 8)
    refused("E_TRUNCATED", ops.grouped_linear, x, packed[:-1].clone(), offsets, 8)
    refused("E_TRUNCATED", ops.grouped_linear, x, packed[:0].clone(), offsets, 8)
    refused("E_MAGIC", ops.grouped_linear, x, torch.zeros_like(packed), offsets, 8)


@pytest.mark.parametrize("compute", ["int8", "stored"])
def test_what_only_cpus_compute_is_refused_on_a_gpu_not_replaced(compute):
    with pytest.raises(QmoeError) as caught:
        ops.cuda.linear(torch.zeros(1, 4), torch.zeros(4, dtype=torch.uint8), 1, compute)
    assert caught.value.code == "E_NO_KERNEL"


def test_compiled_ops_equal_eager_ones():
    packed, _ = record(3, 12, 40)
    offsets = torch.tensor([0, 2, 2, 5])
    x = torch.randn(5, 40)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.grouped_linear(x * 2, packed, offsets, 12) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("elsewhere", ["ids", "weights", "bias"])
def test_what_is_on_another_device_is_refused_before_its_address_is_used(elsewhere):
    places = {name: "meta" if name == elsewhere else "cpu" for name in ("ids", "weights", "bias")}
    x, record = torch.zeros(2, 8), torch.zeros(4, dtype=torch.uint8)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=places["ids"])
    weights, bias = torch.zeros(2, 1, device=places["weights"]), torch.zeros(1, 8, device=places["bias"])
    with pytest.raises(QmoeError) as caught:
        ops.cuda.experts(x, ids, weights, record, record, None, bias, "halves", "silu", False, 0.0, 0.0)
    assert caught.value.code == "E_VALUE" and "device" in str(caught.value)
