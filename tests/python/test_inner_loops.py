"""The inner loops of calibrated rounding on the CPU against their slow twins in torch: bit for bit where sums go the
same way, whatever the number of threads and the instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qmoe_core import _C, IntFormat, QmoeError, TernaryFormat

torch = pytest.importorskip("torch")

from qmoe_core.quantize import feedback, feedback_cpu, gptq, inner_loops  # noqa: E402
from qmoe_core.quantize.base import MethodSpec, StackStatistics  # noqa: E402
from qmoe_core.quantize.grids import IntGrid, TernaryGrid  # noqa: E402

CPU = torch.device("cpu")
# (E, N, K), first column of the block, its columns
BLOCKS = [
    ((1, 1, 1), 0, 1),
    ((2, 5, 7), 0, 7),
    ((3, 129, 200), 128, 72),
    ((2, 33, 131), 0, 128),
    ((2, 300, 256), 128, 128),
    ((1, 130, 64), 32, 32),
    ((1, 16, 48), 0, 17),
]
KINDS = ["int4", "int2-half", "int3-narrow", "int8-negative", "ternary"]
GUARD = 77


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs(shape: tuple[int, int, int], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return {
        "weight": normal(*shape),
        "target": normal(experts, rows, width),
        "coefficients": 0.2 * normal(experts, columns, columns),
        "precision": normal(experts, width).square() + 0.1,
        "residual": 0.1 * normal(*shape),
    }


def make_grid(kind: str, shape: tuple[int, int, int]) -> IntGrid | TernaryGrid:
    generator = torch.Generator().manual_seed(1)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator)

    if kind == "ternary":
        ternary = TernaryGrid(TernaryFormat("pair"), torch.full((shape[0], 1), 0.1).expand(shape[:2]))
        ternary.high, ternary.low = uniform(*shape[:2]) + 0.5, -uniform(*shape[:2]) - 0.3
        ternary.bits = torch.tensor([2.1, 0.7, 1.9]).repeat(shape[0], 1)
        return ternary
    formats = {
        "int4": IntFormat(4, 128),
        "int2-half": IntFormat(2, 32, half_step=True),
        "int3-narrow": IntFormat(3, 16),
        "int8-negative": IntFormat(8, 0, False),
    }
    grid = IntGrid(formats[kind], shape, CPU, 24)
    grid.scale = uniform(*grid.scale.shape) * 0.3 + 0.05
    grid.zero = (uniform(*grid.zero.shape) * grid.top).round() + (0.5 if grid.format.half_step else 0.0)
    if not grid.format.zero_point:
        grid.scale *= -1
    return grid


def rounded(kind: str, shape: tuple[int, int, int], first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and residuals, with guard zones around what is written."""
    given, columns = inputs(shape, width), slice(first, first + width)
    coefficients = given["coefficients"][:, columns, columns]
    if kind == "ternary":
        coefficients = coefficients.transpose(1, 2).contiguous().transpose(1, 2)  # as factorizations come
    size = given["residual"].numel()
    residual = torch.full((size + 2 * GUARD,), 7.0)
    codes = torch.full((size + 2 * GUARD,), 77, dtype=torch.int8)
    inner, code = residual[GUARD:][:size].view(shape), codes[GUARD:][:size].view(shape)
    inner.copy_(given["residual"])
    feedback._round_block(
        given["weight"], given["target"], coefficients, given["precision"], make_grid(kind, shape), columns, code, inner
    )
    return codes, residual


@pytest.mark.parametrize(("shape", "first", "width"), BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_equals_the_twin_bit_for_bit(
    kind: str, shape: tuple[int, int, int], first: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with threads(1):
        codes, residual = rounded(kind, shape, first, width)
    with threads(3):
        again = rounded(kind, shape, first, width)
    assert torch.equal(codes, again[0]) and torch.equal(residual, again[1])
    monkeypatch.setattr(inner_loops, "of", lambda tensor: None)
    expected_codes, expected_residual = rounded(kind, shape, first, width)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(residual, expected_residual)


def chosen(format: IntFormat, shape: tuple[int, int, int], twin: bool) -> IntGrid:
    given, grid = inputs(shape, shape[2]), IntGrid(format, shape, CPU, 24)
    grid.scale.fill_(float("nan"))
    target = given["weight"]
    target[0, 0] = 0.0  # nothing to fit a grid to
    target[-1, -1] = target[-1, -1].abs()
    if twin:
        grid._choose(target, given["precision"], slice(0, 1))
    else:
        feedback_cpu.choose_grid(grid, target, given["precision"], 0)
    return grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["zero", "symmetric", "half", "half symmetric"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 40), (2, 70, 128), (1, 131, 300)])
def test_chosen_grids_are_as_good_as_the_twins(
    bits: int, kind: str, scale_dtype: str, shape: tuple[int, int, int]
) -> None:
    format = IntFormat(bits, 0, "symmetric" not in kind, scale_dtype, half_step="half" in kind)
    kernel, twin = chosen(format, shape, False), chosen(format, shape, True)
    given = inputs(shape, shape[2])
    target = given["weight"].double()
    target[0, 0] = 0.0
    target[-1, -1] = target[-1, -1].abs()

    def error(grid: IntGrid) -> torch.Tensor:
        scale, zero = grid.scale.double(), grid.zero.double()
        codes = (target / scale + zero).round().clamp(0, grid.top)
        return ((scale * (codes - zero) - target).square() * given["precision"].unsqueeze(1)).sum(2)

    assert torch.allclose(error(kernel), error(twin), rtol=1e-4, atol=1e-9)
    assert ((kernel.scale == twin.scale) & (kernel.zero == twin.zero)).float().mean() > 0.9
    with threads(3):
        again = chosen(format, shape, False)
    assert torch.equal(kernel.scale, again.scale) and torch.equal(kernel.zero, again.zero)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_are_rounded_as_torch_does(scale_dtype: str) -> None:
    """Every magnitude from far below the smallest scale to beyond the largest one."""
    largest = {"float16": 65504.0, "bfloat16": 3e38, "float32": 3e38}[scale_dtype]
    magnitudes = torch.cat([torch.logspace(-44, 38, 5000), torch.linspace(0.5, 1.5, 2000) * largest]).clamp(max=3e38)
    shape = (1, len(magnitudes), 1)
    grids = [IntGrid(IntFormat(4, 0, False, scale_dtype), shape, CPU, 2) for _ in range(2)]
    target, precision = 7.0 * magnitudes.view(shape), torch.full((1, 1), 1e-30)
    target = torch.where(torch.isfinite(target), target, torch.full_like(target, 3e38))
    feedback_cpu.choose_grid(grids[0], target, precision, 0)
    grids[1]._choose(target, precision, slice(0, 1))
    finite = torch.isfinite(grids[1].scale)
    assert torch.equal(finite, torch.isfinite(grids[0].scale))
    assert int(finite.sum()) > 0 and (scale_dtype != "float16" or int((~finite).sum()) > 0)
    scale = grids[0].scale[finite].abs()
    assert torch.equal(grids[1].stored(scale), scale)
    assert (grids[0].scale == grids[1].scale).float().mean() > 0.95


def summed(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    given, grid = inputs(shape, shape[2]), make_grid("ternary", shape)
    assert isinstance(grid, TernaryGrid)
    return feedback_cpu.ternary_sums(grid, given["weight"], given["precision"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 131), (2, 140, 512), (3, 5, 16)])
def test_ternary_sums_equal_float64(shape: tuple[int, int, int]) -> None:
    given, grid = inputs(shape, shape[2]), make_grid("ternary", shape)
    weight, precision = given["weight"], given["precision"]
    sums, counts = summed(shape)
    codes, _ = grid.round(weight, precision.unsqueeze(1), 0)
    for at, sign in ((0, -1), (2, 1)):
        picked = (codes == sign) * precision.double().unsqueeze(1)
        assert torch.allclose(sums[:, :, at].double(), (picked * weight).sum(2), rtol=1e-5, atol=1e-5)
        assert torch.allclose(sums[:, :, at + 1].double(), picked.sum(2), rtol=1e-5)
    assert torch.equal(counts.long(), torch.stack([(codes == value).sum((1, 2)) for value in (-1, 0, 1)], dim=1))
    with threads(3):
        again = summed(shape)
    assert torch.equal(again[0], sums) and torch.equal(again[1], counts)


FORMATS = [
    IntFormat(4, 128),
    IntFormat(2, 16, half_step=True),
    IntFormat(3, 0),
    TernaryFormat("pair"),
    TernaryFormat("symmetric"),
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_stacks_come_out_as_by_the_twins(format: IntFormat | TernaryFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 70, 288, generator=generator).transpose(0, 1).contiguous().transpose(0, 1)
    x = torch.randn(2, 900, 288, generator=generator) @ (torch.eye(288) + 0.05 * torch.randn(288, 288))
    drift = 0.01 * torch.bmm(x.transpose(1, 2), x)
    statistics = StackStatistics(torch.full((2,), 900), torch.bmm(x.transpose(1, 2), x), drift=drift)
    spec = MethodSpec("gptq", format)
    quick = gptq.quantize_stack(weight, statistics, spec)
    monkeypatch.setattr(inner_loops, "of", lambda tensor: None)
    slow = gptq.quantize_stack(weight, statistics, spec)
    for (matrix, report), (expected, of_twin) in zip(quick, slow, strict=True):
        assert report.output_error == pytest.approx(of_twin.output_error, rel=0.02)
        same = (torch.from_numpy(matrix.dequantize()) == torch.from_numpy(expected.dequantize())).float().mean()
        assert same > 0.8


def digest() -> str:
    """Of everything that the loops make of a few inputs."""
    out = hashlib.sha256()
    results: list[torch.Tensor] = []
    for kind in KINDS:
        results += rounded(kind, (2, 37, 200), 64, 101)
    for format in (IntFormat(4, 0), IntFormat(2, 0, half_step=True), IntFormat(3, 0, False, "bfloat16")):
        grid = chosen(format, (2, 37, 131), False)
        results += [grid.scale, grid.zero]
    for tensor in [*results, *summed((2, 37, 131))]:
        out.update(tensor.numpy().tobytes())
    return out.hexdigest()


@pytest.mark.parametrize("isa", _C.cpu_features())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = "import test_inner_loops; print(test_inner_loops.digest())"
    here, environment = os.path.dirname(__file__), {**os.environ, "QMOE_FORCE_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split()[-1] == digest()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    code = (
        "import torch; from qmoe_core import IntFormat; from qmoe_core.quantize import feedback_cpu, grids;"
        "grid = grids.IntGrid(IntFormat(4, 0), (1, 1, 1), torch.device('cpu'), 2);"
        "feedback_cpu.choose_grid(grid, torch.ones(1, 1, 1), torch.ones(1, 1), 0)"
    )
    environment = {**os.environ, "QMOE_FORCE_ISA": "abacus"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "E_NO_KERNEL" in result.stderr


def test_refusals() -> None:
    shape = (1, 4, 256)
    given, grid = inputs(shape, 128), make_grid("int4", shape)
    codes = torch.zeros(shape, dtype=torch.int8)

    def call(columns: slice = slice(0, 128), to: object = grid, **changes: torch.Tensor) -> str:
        use = {**given, "codes": codes, **changes}
        with pytest.raises(QmoeError) as error:
            feedback_cpu.round_block(
                use["weight"], use["target"], use["coefficients"][:, :128, :128], use["precision"], to, columns,
                use["codes"], use["residual"],
            )  # fmt: skip
        return error.value.code

    assert call(weight=given["weight"].double()) == "E_DTYPE"
    assert call(target=given["target"][:, :, :5]) == "E_SHAPE"
    assert call(codes=codes.transpose(1, 2).contiguous().transpose(1, 2)) == "E_SHAPE"
    assert call(precision=given["precision"].to("meta")) == "E_NO_KERNEL"
    assert call(to=object()) == "E_NO_KERNEL"
    assert call(columns=slice(0, 129)) == "E_SHAPE"
    wide = IntGrid(IntFormat(4, 64), (1, 4, 64), CPU, 2)  # one group, where the block reaches into the next
    assert call(to=wide) == "E_SHAPE"
