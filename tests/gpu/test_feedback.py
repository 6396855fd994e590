"""Calibrated rounding on the GPU: the kernels against their slow twins in torch, bit for bit where sums go the same
way, and whole stacks against float64."""

from __future__ import annotations

import pytest

from qmoe_core import IntFormat, QmoeError, TernaryFormat

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from qmoe_core.quantize import feedback, feedback_cuda, gptq, products  # noqa: E402
from qmoe_core.quantize.base import MethodSpec, StackStatistics  # noqa: E402
from qmoe_core.quantize.grids import IntGrid, TernaryGrid  # noqa: E402

# (E, N, K), first column of the block, its columns
BLOCKS = [
    ((1, 1, 1), 0, 1),
    ((2, 5, 7), 0, 7),
    ((3, 129, 200), 128, 72),
    ((2, 33, 131), 0, 128),
    ((2, 300, 256), 128, 128),
    ((1, 130, 64), 32, 32),
]
GUARD = 77


def inputs(shape: tuple[int, int, int], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    experts, rows, columns = shape
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", generator=generator)

    return {
        "weight": normal(*shape),
        "target": normal(experts, rows, width),
        "coefficients": 0.2 * normal(experts, columns, columns),
        "precision": normal(experts, width).square() + 0.1,
        "residual": 0.1 * normal(*shape),
    }


def int_grid(shape: tuple[int, int, int], bits: int, group: int, zero_point: bool = True) -> IntGrid:
    grid = IntGrid(IntFormat(bits, group, zero_point), shape, torch.device("cuda"), 24)
    generator = torch.Generator(device="cuda").manual_seed(1)
    grid.scale = torch.rand(grid.scale.shape, device="cuda", generator=generator) * 0.3 + 0.05
    half = 0.5 if group == 32 else 0.0
    grid.zero = torch.randint(0, grid.top + 1, grid.zero.shape, device="cuda", generator=generator) + half
    if not zero_point:
        grid.scale *= -1
    return grid


def ternary_grid(shape: tuple[int, int, int]) -> TernaryGrid:
    price = torch.full((shape[0], 1), 0.1, device="cuda").expand(shape[:2])
    grid = TernaryGrid(TernaryFormat("pair"), price)
    grid.high = torch.rand(shape[:2], device="cuda") + 0.5
    grid.low = -torch.rand(shape[:2], device="cuda") - 0.3
    grid.bits = torch.tensor([2.1, 0.7, 1.9], device="cuda").repeat(shape[0], 1)
    return grid


@pytest.mark.parametrize(("shape", "first", "width"), BLOCKS)
@pytest.mark.parametrize("kind", ["int4", "int2-half-row", "int8-negative", "ternary"])
def test_rounding_equals_the_twin_bit_for_bit(
    kind: str, shape: tuple[int, int, int], first: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {
        "int4": lambda: int_grid(shape, 4, 128),
        "int2-half-row": lambda: int_grid(shape, 2, 32),
        "int8-negative": lambda: int_grid(shape, 8, 0, False),
        "ternary": lambda: ternary_grid(shape),
    }
    grid, given, columns = grids[kind](), inputs(shape, width), slice(first, first + width)
    coefficients = given["coefficients"][:, columns, columns]
    if kind == "ternary":
        coefficients = coefficients.transpose(1, 2).contiguous().transpose(1, 2)  # as factorizations come

    def run(twin: bool) -> tuple[torch.Tensor, torch.Tensor]:
        # Guard zones around what is written.
        size = given["residual"].numel()
        residual = torch.full((size + 2 * GUARD * 4,), 7.0, device="cuda")
        codes = torch.full((size + 2 * GUARD * 16,), 77, dtype=torch.int8, device="cuda")
        inner, code = residual[GUARD * 4 :][:size].view(shape), codes[GUARD * 16 :][:size].view(shape)
        inner.copy_(given["residual"])
        monkeypatch.setattr(feedback_cuda, "usable", lambda weight: not twin)
        target = given["target"].clone()
        feedback._round_block(given["weight"], target, coefficients, given["precision"], grid, columns, code, inner)
        return codes, residual

    codes, residual = run(twin=False)
    expected_codes, expected_residual = run(twin=True)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(residual, expected_residual)
    again = run(twin=False)
    assert torch.equal(codes, again[0]) and torch.equal(residual, again[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 40), (2, 70, 128)])
def test_chosen_grids_are_as_good_as_the_twins(bits: int, zero_point: bool, shape: tuple[int, int, int]) -> None:
    given = inputs(shape, shape[2])
    target, precision = given["weight"], given["precision"]
    kernel, twin = (IntGrid(IntFormat(bits, 128, zero_point), shape, torch.device("cuda"), 24) for _ in range(2))
    feedback_cuda.choose_grid(kernel, target, precision, 0)
    twin._choose(target, precision, slice(0, 1))

    def error(grid: IntGrid) -> torch.Tensor:
        scale, zero = grid.scale.double(), grid.zero.double()
        codes = (target.double() / scale + zero).round().clamp(0, grid.top)
        return ((scale * (codes - zero) - target).square() * precision.unsqueeze(1)).sum(2)

    assert torch.allclose(error(kernel), error(twin), rtol=1e-4, atol=1e-10)
    assert ((kernel.scale == twin.scale) & (kernel.zero == twin.zero)).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 131), (2, 70, 512)])
def test_ternary_sums_equal_float64(shape: tuple[int, int, int]) -> None:
    given, grid = inputs(shape, shape[2]), ternary_grid(shape)
    weight, precision = given["weight"], given["precision"]
    sums, counts = feedback_cuda.ternary_sums(grid, weight, precision)
    codes, _ = grid.round(weight, precision.unsqueeze(1), 0)
    for at, sign in ((0, -1), (2, 1)):
        chosen = (codes == sign) * precision.double().unsqueeze(1)
        assert torch.allclose(sums[:, :, at].double(), (chosen * weight).sum(2), rtol=1e-5, atol=1e-5)
        assert torch.allclose(sums[:, :, at + 1].double(), chosen.sum(2), rtol=1e-5)
    assert torch.equal(counts.long(), torch.stack([(codes == value).sum((1, 2)) for value in (-1, 0, 1)], dim=1))
    again, _ = feedback_cuda.ternary_sums(grid, weight, precision)
    assert torch.equal(again, sums)


@pytest.mark.parametrize(("left", "right", "bits"), [(1, 3, 24), (2, 2, 16), (2, 3, 24), (3, 3, 24), (1, 1, 8)])
def test_products_on_tensor_cores_have_the_bits_that_they_promise(left: int, right: int, bits: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(5)
    a = torch.randn(2, 70, 300, device="cuda", generator=generator)
    b = torch.randn(2, 300, 33, device="cuda", generator=generator)
    if left == 1:
        a = (3 * a).round()
    off = (products.product(a, b, left, right).double() - a.double() @ b.double()).abs()
    # Of each product, and float32 sums of 300 and more of them.
    assert bool((off <= (4 * 2.0**-bits + 300 * 2.0**-24) * (a.double().abs() @ b.double().abs())).all())
    assert products.has_tensor_cores(a) and not products.has_tensor_cores(a.double())


@pytest.mark.parametrize(("columns", "block"), [(300, 128), (96, 32), (20, 32)])
def test_products_of_a_side_that_changes(columns: int, block: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(6)
    stack = torch.randn(2, 70, columns, device="cuda", generator=generator)
    right = torch.randn(2, columns, columns, device="cuda", generator=generator)
    started, empty = products.LeftSide(stack, block), products.LeftSide(torch.zeros_like(stack), block, zero=True)

    def check(left: products.LeftSide, inner: int) -> None:
        part = slice(columns // 3, columns)
        a, b = left.stack[:, :, :inner].double(), right[:, :inner, part].double()
        off = (left.times(right[:, :inner, part]).double() - a @ b).abs()
        assert bool((off <= (4 * 2.0**-16 + columns * 2.0**-24) * (a.abs() @ b.abs())).all())

    check(started, columns)
    for first in range(0, columns, block):
        now = slice(first, min(first + block, columns))
        for left in (started, empty):
            left.stack[:, :, now] = torch.randn(left.stack[:, :, now].shape, device="cuda", generator=generator)
            left.update(now)
        check(started, columns)
        check(empty, now.stop)


@pytest.mark.parametrize("group", [0, 32])
def test_scales_beyond_their_type_are_refused(group: int) -> None:
    weight, statistics = stack((1, 8, 64))
    with pytest.raises(QmoeError, match="float16") as error:
        gptq.quantize_stack(1e8 * weight, statistics, MethodSpec("gptq", IntFormat(4, group)))
    assert error.value.code == "E_VALUE"


def stack(shape: tuple[int, int, int]) -> tuple[torch.Tensor, StackStatistics]:
    experts, _, columns = shape
    generator = torch.Generator(device="cuda").manual_seed(3)
    mixing = torch.randn(columns, columns, device="cuda", generator=generator) / columns**0.5
    mixing += torch.eye(columns, device="cuda")
    x = torch.randn(experts, 3 * columns, columns, device="cuda", generator=generator) @ mixing
    weight = torch.randn(shape, device="cuda", generator=generator)
    return weight, StackStatistics(torch.full((experts,), 3 * columns), torch.bmm(x.transpose(1, 2), x))


def test_large_matrices_factorize_panel_by_panel() -> None:
    columns = 4 * feedback.PANEL + 41
    x = torch.randn(2, 2 * columns, columns, device="cuda", generator=torch.Generator(device="cuda").manual_seed(4))
    hessian = torch.bmm(x.transpose(1, 2), x) / len(x[0])
    hessian[1] -= 0.1 * torch.eye(columns, device="cuda")  # indefinite: needs more damping
    factors = feedback.factorize(hessian, 0.01)
    upper, diagonal = factors.unit_upper.double(), factors.diagonal.double()
    product = upper @ (diagonal.unsqueeze(2) * upper.transpose(1, 2))
    assert torch.allclose(product, factors.hessian.double(), rtol=0, atol=1e-5)
    assert torch.equal(upper.tril(-1), torch.zeros_like(upper)) and bool((diagonal > 0).all())
    extra = (factors.hessian - hessian).diagonal(dim1=1, dim2=2).mean(1)
    assert float(extra[1]) > 2 * float(extra[0])


FORMATS = [
    IntFormat(4, 128),
    IntFormat(2, 32),
    IntFormat(2, 16, half_step=True),
    IntFormat(8, 0, half_step=True),
    TernaryFormat("pair"),
    TernaryFormat("symmetric"),
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_stacks_on_the_gpu_come_out_as_on_the_cpu(format: IntFormat | TernaryFormat) -> None:
    weight, statistics = stack((2, 96, 1056))  # several spans, and a last block that is short
    spec = MethodSpec("gptq", format)
    on_cpu = StackStatistics(statistics.tokens, statistics.hessian.cpu())
    there = gptq.quantize_stack(weight, statistics, spec)
    here = gptq.quantize_stack(weight.cpu(), on_cpu, spec)
    again = gptq.quantize_stack(weight, statistics, spec)
    for e, ((matrix, report), (_, expected), (same, _)) in enumerate(zip(there, here, again, strict=True)):
        assert (matrix.dequantize() == same.dequantize()).all()
        assert report.output_error == pytest.approx(expected.output_error, rel=0.02)
        off = weight[e].double() - torch.from_numpy(matrix.dequantize()).cuda().double()
        hessian = statistics.hessian[e].double() / float(statistics.tokens[e])
        assert report.output_error == pytest.approx(float((off @ hessian * off).sum()), rel=1e-3)


def test_refusals() -> None:
    shape = (1, 4, 256)
    given, grid = inputs(shape, 128), int_grid(shape, 4, 128)
    codes = torch.zeros(shape, dtype=torch.int8, device="cuda")

    def call(**changes: torch.Tensor) -> str:
        use = {**given, "codes": codes, "columns": slice(0, 128), **changes}
        use["coefficients"] = use["coefficients"][:, :128, :128]
        with pytest.raises(QmoeError) as error:
            feedback_cuda.round_block(
                use["weight"], use["target"], use["coefficients"], use["precision"], changes.get("grid", grid),
                use["columns"], use["codes"], use["residual"],
            )  # fmt: skip
        return error.value.code

    assert call(weight=given["weight"].double()) == "E_DTYPE"
    assert call(target=given["target"][:, :, :5]) == "E_SHAPE"
    assert call(codes=codes.transpose(1, 2).contiguous().transpose(1, 2)) == "E_SHAPE"
    assert call(precision=given["precision"].cpu()) == "E_NO_KERNEL"
    assert call(grid=object()) == "E_NO_KERNEL"
    assert call(columns=slice(0, 129)) == "E_SHAPE"


def test_what_is_reserved_on_the_host_holds_what_comes() -> None:
    feedback_cuda.reserve_host([1 << 20, 1 << 16], "cuda")
    feedback_cuda.reserve_host([], "cuda")
    for count in (1 << 20, 1 << 16):
        there = torch.randint(-128, 128, (count,), dtype=torch.int8, device="cuda")
        here = feedback_cuda.to_host(there)
        assert here.is_pinned() and torch.equal(here, there.cpu())
