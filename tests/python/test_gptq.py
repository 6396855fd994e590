"""Calibrated quantization against float64 references: the two sweeps, the grids, and what the whole method promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qmoe_core.errors import QmoeError
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor, TernaryFormat
from qmoe_core.quantize import MethodSpec, StackStatistics, feedback, quantize, quantize_stack
from qmoe_core.quantize.base import dequantize, dequantized
from qmoe_core.quantize.feedback import descend, factorize, output_error, retarget, round_with_feedback
from qmoe_core.quantize.gptq import lean_on_pooled
from qmoe_core.quantize.grids import IntGrid, TernaryGrid
from qmoe_core.quantize.products import parts

FORMATS = [
    IntFormat(2, 64),
    IntFormat(3, 128),
    IntFormat(4, 0),
    IntFormat(8, 32),
    IntFormat(2, 32, zero_point=False),
    IntFormat(4, 0, zero_point=False, scale_dtype="bfloat16"),
    TernaryFormat(),
    TernaryFormat("symmetric"),
]
SHAPES = [(1, 1, 1), (2, 5, 7), (3, 17, 100), (2, 40, 256), (1, 3, 300), (1, 3, 1100)]


def problem(shape: tuple[int, int, int], tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, StackStatistics]:
    """Weights, and statistics of strongly correlated inputs."""
    experts, _, columns = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(experts, tokens, columns, generator=generator) @ mixing
    hessian = inputs.transpose(1, 2) @ inputs
    counts = torch.full((experts,), tokens)
    return weight, StackStatistics(counts, hessian, hessian.sum(0), tokens * experts)


def stacked(results: list) -> torch.Tensor:
    return torch.stack([torch.from_numpy(matrix.dequantize()) for matrix, _ in results])


def relative(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    error, hessian = (weight - quantized).double(), hessian.double()
    total = ((weight.double() @ hessian) * weight.double()).sum()
    return float((((error @ hessian) * error).sum() / total).sqrt())


def test_factors_multiply_to_the_damped_matrix():
    _, statistics = problem((3, 1, 65))
    factors = factorize(statistics.hessian, 0.01)
    upper, diagonal = factors.unit_upper.double(), factors.diagonal.double()
    product = upper @ torch.diag_embed(diagonal) @ upper.transpose(1, 2)
    expected = statistics.hessian.double()
    expected += 0.01 * torch.diag_embed(expected.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, 65))
    assert torch.allclose(product, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(upper.tril(-1), torch.zeros_like(upper)) and bool((diagonal > 0).all())


def test_indefinite_and_singular_statistics_still_factorize():
    vector = torch.randn(1, 24)
    singular = (vector.T @ vector).unsqueeze(0)
    nearly = singular - 1e-4 * torch.eye(24)  # rounding can do this to a matrix of few tokens
    for hessian in (singular, nearly, torch.zeros(1, 24, 24)):
        factors = factorize(hessian, 0.0)
        assert bool(torch.isfinite(factors.unit_upper).all()) and bool((factors.diagonal > 0).all())
    with pytest.raises(QmoeError, match="NaN") as error:
        factorize(torch.full((1, 4, 4), float("nan")), 0.01)
    assert error.value.code == "E_VALUE"


class Rounding:
    """Round to whole multiples of a fixed step, the simplest grid."""

    block = 32

    def __init__(self, step: float) -> None:
        self.step = step

    def begin_block(self, target, precision, columns):
        pass

    def refine_block(self, residual, gradient, hessian, codes, columns):
        return None

    def round(self, target, precision, column):
        codes = (target / self.step).round().clamp(-100, 100)
        return codes.to(torch.int8), codes * self.step


@pytest.mark.parametrize("span", [512, 64])
def test_feedback_is_gptq(span, monkeypatch):
    """Column by column with explicit inverses, as GPTQ is published, in float64."""
    monkeypatch.setattr(feedback, "SPAN", span)
    weight, statistics = problem((2, 9, 70))
    factors = factorize(statistics.hessian, 0.02)
    codes, residual = round_with_feedback(weight.double(), _double(factors), Rounding(0.02))
    for expert in range(2):
        hessian, work = factors.hessian[expert].double(), weight[expert].double().clone()
        expected = torch.zeros_like(work)
        for j in range(70):
            inverse = torch.linalg.inv(hessian[j:, j:])  # of the columns that are still free
            expected[:, j] = (work[:, j] / 0.02).round() * 0.02
            error = (work[:, j] - expected[:, j]) / inverse[0, 0]
            work[:, j:] -= error[:, None] * inverse[0, None, :]
        assert torch.allclose(weight[expert].double() - residual[expert], expected, atol=1e-9)
        assert torch.allclose(codes[expert].double() * 0.02, expected, atol=1e-9)


def _double(factors):
    return dataclasses.replace(
        factors, hessian=factors.hessian.double(), unit_upper=factors.unit_upper.double(),
        diagonal=factors.diagonal.double(),
    )  # fmt: skip


@pytest.mark.parametrize("span", [512, 64])
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(span, monkeypatch):
    monkeypatch.setattr(feedback, "SPAN", span)
    weight, statistics = problem((2, 9, 70))
    factors = _double(factorize(statistics.hessian, 0.02))
    weight, grid = weight.double(), Rounding(0.05)
    codes, residual = round_with_feedback(weight, factors, grid)
    errors = [output_error(residual, factors.hessian)]
    for _ in range(30):
        descend(weight, factors, grid, codes, residual)
        errors.append(output_error(residual, factors.hessian))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-12)).all())
    assert bool((errors[-1] < errors[0]).all())
    assert torch.allclose(weight - codes.double() * 0.05, residual, atol=1e-12)
    for column in range(70):
        for step in (-0.05, 0.05):
            moved = residual.clone()
            moved[:, :, column] += step
            rows = ((moved @ factors.hessian) * moved).sum(2)
            assert bool((rows >= ((residual @ factors.hessian) * residual).sum(2) - 1e-9).all())


def test_retarget_solves_least_squares_on_the_original_outputs():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 6, 20, generator=generator)
    seen = torch.randn(2, 300, 20, generator=generator)
    original = seen + 0.3 * torch.randn(2, 300, 20, generator=generator)
    hessian = seen.transpose(1, 2) @ seen
    drift = (original - seen).transpose(1, 2) @ seen
    best = retarget(weight, drift, factorize(hessian, 0.0))
    for expert in range(2):
        outputs = original[expert].double() @ weight[expert].double().T
        expected = torch.linalg.lstsq(seen[expert].double(), outputs).solution.T
        assert torch.allclose(best[expert].double(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_shape_packs_and_reports_what_it_lost(format, shape):
    weight, statistics = problem(shape)
    results = quantize_stack(weight, statistics, MethodSpec("gptq", format))
    packed = PackedTensor.pack([matrix for matrix, _ in results])
    packed.verify()
    for expert, (matrix, report) in enumerate(results):
        quantized = torch.from_numpy(matrix.dequantize())
        assert np.array_equal(packed.decode(expert), matrix.dequantize())
        assert report.error_sum == pytest.approx(float((weight[expert] - quantized).double().square().sum()), rel=1e-3)
        shared, _ = lean_on_pooled(statistics, 0.25)
        expected = relative(weight[expert : expert + 1], quantized[None], shared.hessian[expert : expert + 1])
        assert report.relative_output_error == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert report.zeros == int((quantized == 0).sum())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_calibration_beats_rounding_and_every_ingredient_helps(format):
    weight, statistics = problem((2, 64, 256), tokens=1500)
    plain = "rtn" if isinstance(format, IntFormat) else "ternary-centroid"
    rounded = torch.stack([torch.from_numpy(quantize(w, MethodSpec(plain, format))[0].dequantize()) for w in weight])

    def error(**options: object) -> float:
        results = quantize_stack(weight, statistics, MethodSpec("gptq", format, {"rate": 0.0, **options}))
        return relative(weight, stacked(results), statistics.hessian)

    one_pass, swept = error(sweeps=0), error(sweeps=2)
    assert one_pass < 0.9 * relative(weight, rounded, statistics.hessian)
    assert swept < 0.98 * one_pass
    assert error(order="activation") < one_pass


def test_two_runs_are_bitwise_equal():
    weight, statistics = problem((2, 33, 130))
    for format in FORMATS:
        first, second = (quantize_stack(weight, statistics, MethodSpec("gptq", format)) for _ in range(2))
        assert torch.equal(stacked(first), stacked(second))


def test_a_higher_rate_gives_fewer_bits_and_more_error():
    weight, statistics = problem((2, 64, 512))
    bits, errors = [], []
    for rate in (0.0, 5.0, 20.0, 50.0):
        results = quantize_stack(weight, statistics, MethodSpec("gptq", TernaryFormat(), {"rate": rate}))
        bits.append(PackedTensor.pack([matrix for matrix, _ in results]).bits_per_weight)
        errors.append(relative(weight, stacked(results), statistics.hessian))
    assert bits == sorted(bits, reverse=True) and bits[-1] < 0.7 * bits[0]
    assert errors == sorted(errors)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_reported_errors_of_many_rows_are_those_of_a_fair_sample(every):
    """Also where rows take turns, as those of gates and ups may."""
    weight, statistics = problem((2, 1500, 64))
    weight[:, ::every] *= 4
    results = quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(3, 32)))
    shared, _ = lean_on_pooled(statistics, 0.25)
    hessian, quantized = shared.hessian.double(), stacked(results)
    for stack, name in ((weight, "output_energy"), (weight - quantized, "output_error")):
        exact = ((stack.double() @ hessian) * stack).sum((1, 2))
        reported = torch.tensor([getattr(report, name) for _, report in results], dtype=torch.float64)
        torch.testing.assert_close(reported, exact, rtol=0.05, atol=0)


def test_the_price_of_a_bit_goes_with_the_root_of_what_the_matrix_contributes():
    weight, statistics = problem((3, 24, 64))
    own = output_error(weight, statistics.hessian / 400).float().unsqueeze(1)
    importance = (torch.rand(3, 24, generator=torch.Generator().manual_seed(1)) + 0.5) / own

    def matrices(rate: float, importance: torch.Tensor | None) -> torch.Tensor:
        spec = MethodSpec("gptq", TernaryFormat(), {"rate": rate, "damping": 0.0, "prior": 0.0})
        return stacked(quantize_stack(weight, dataclasses.replace(statistics, row_importance=importance), spec))

    # Four times the share of everything, twice the price: half as much for an error that counts four times.
    torch.testing.assert_close(matrices(8.0, importance), matrices(16.0, 4 * importance), rtol=0, atol=0)
    assert not torch.equal(matrices(8.0, importance), matrices(8.0, 4 * importance))
    # Without a share, that of the matrix's own output; so it is where all rows count alike and the share is one.
    torch.testing.assert_close(matrices(8.0, None), matrices(8.0, (1 / own).expand(3, 24)), rtol=1e-3, atol=1e-3)


def test_activation_order_stores_every_scale_with_its_own_group():
    weight, statistics = problem((2, 8, 200))
    results = quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(8, 64), {"order": "activation"}))
    assert relative(weight, stacked(results), statistics.hessian) < 0.01
    assert all(isinstance(matrix, IntMatrix) for matrix, _ in results)


def test_few_and_no_tokens_lean_on_the_layer():
    weight, full = problem((4, 16, 64), tokens=4000)
    hessian = full.hessian.clone()
    hessian[1] = 0
    generator = torch.Generator().manual_seed(9)
    few = torch.randn(3, 64, generator=generator)
    hessian[2] = few.T @ few
    statistics = StackStatistics(torch.tensor([4000, 0, 3, 4000]), hessian, full.pooled, full.pooled_tokens)
    results = quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(3, 64)))
    notes = [dict(report.notes) for _, report in results]
    assert notes[0] == notes[3] == {} and "no tokens: statistics of the layer" in notes[1]
    assert any("fewer tokens" in note for note in notes[2])
    assert all(np.isfinite(matrix.dequantize()).all() for matrix, _ in results)
    alone = dataclasses.replace(full, pooled=None, pooled_tokens=0, tokens=torch.zeros(4), hessian=0 * full.hessian)
    results = quantize_stack(weight, alone, MethodSpec("gptq", IntFormat(3, 64)))
    assert all("rounded to nearest" in next(iter(report.notes)) for _, report in results)
    # An expert that saw three tokens must do better with the layer's statistics than with its own alone.
    truth = full.hessian[2:3]
    leaning = relative(
        weight[2:3], stacked(quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(2, 64))))[2:3], truth
    )
    own = relative(
        weight[2:3],
        stacked(quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(2, 64), {"prior": 0.0})))[2:3],
        truth,
    )
    assert leaning < own


def test_constant_and_zero_weights():
    _, statistics = problem((2, 8, 64))
    for value in (0.0, 0.25, -3.0):
        weight = torch.full((2, 8, 64), value)
        for format in FORMATS:
            results = quantize_stack(weight, statistics, MethodSpec("gptq", format))
            error = (stacked(results) - weight).abs().max()
            assert float(error) <= 0.02 * abs(value), (format.name, value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda w, s: (w.double(), s), "E_DTYPE"),
        (lambda w, s: (w[0], s), "E_SHAPE"),
        (lambda w, s: (w, dataclasses.replace(s, hessian=s.hessian[:, :3])), "E_SHAPE"),
        (lambda w, s: (w.index_fill(2, torch.tensor([3]), float("inf")), s), "E_VALUE"),
        (lambda w, s: (w, dataclasses.replace(s, hessian=s.hessian * float("nan"))), "E_VALUE"),
    ],
)
def test_refusals(change, code):
    weight, statistics = change(*problem((2, 4, 32)))
    with pytest.raises(QmoeError) as error:
        quantize_stack(weight, statistics, MethodSpec("gptq", IntFormat(4, 32)), tensor="layers.3.experts")
    assert error.value.code == code and error.value.tensor == "layers.3.experts"


@pytest.mark.parametrize("options", [{"damping": -1}, {"sweeps": True}, {"order": "random"}, {"rate": "high"}])
def test_bad_options(options):
    weight, statistics = problem((1, 4, 32))
    format = TernaryFormat() if "rate" in options else IntFormat(4, 32)
    with pytest.raises(QmoeError) as error:
        quantize_stack(weight, statistics, MethodSpec("gptq", format, options))
    assert error.value.code == "E_VALUE"


def test_grids_round_to_their_own_values():
    weight, statistics = problem((2, 6, 96))
    factors = factorize(statistics.hessian, 0.01)
    ints = IntGrid(IntFormat(3, 32), (2, 6, 96), weight.device, 24)
    ternary = TernaryGrid(TernaryFormat(), torch.zeros(2, 6))
    for grid in (ints, ternary):
        grid.begin(weight, factors.diagonal)
        codes, residual = round_with_feedback(weight, factors, grid)
        grid.refine(residual, factors.hessian, codes)
        value = weight - residual
        for column in (0, 50, 95):
            again, same = grid.round(value[:, :, column], factors.diagonal[:, column], column)
            assert torch.equal(again, codes[:, :, column]) and torch.allclose(same, value[:, :, column], atol=1e-6)


@pytest.mark.parametrize("group", [0, 32])
def test_scales_beyond_their_type_are_refused(group):
    weight, statistics = problem((1, 4, 64))
    huge = weight * (1e8 / weight.abs().max())
    with pytest.raises(QmoeError, match="float16") as error:
        quantize_stack(huge, statistics, MethodSpec("gptq", IntFormat(4, group)))
    assert error.value.code == "E_VALUE"
    wide = quantize_stack(huge, statistics, MethodSpec("gptq", IntFormat(4, group, scale_dtype="bfloat16")))
    assert relative(huge, stacked(wide), statistics.hessian) < 0.1


def test_parts_of_a_product_add_up_to_the_float32_number():
    matrix = torch.randn(2, 33, 40) * torch.logspace(-20, 20, 40)
    of = parts(matrix, 3)
    assert torch.equal(of[0].float() + of[1].float() + of[2].float(), matrix)
    assert all(part.dtype == torch.bfloat16 for part in of)
    two = of[0].double() + of[1].double()
    assert bool(((two - matrix).abs() <= 2.0**-16 * matrix.abs()).all())


@pytest.mark.parametrize("format", [*FORMATS, IntFormat(2, 16, half_step=True), IntFormat(8, 0, False, half_step=True)],
                         ids=lambda f: f.name)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 3, 300), (1, 5, 7)])
def test_dequantized_on_a_device_has_the_bits_of_numpy(format, shape):
    weight, statistics = problem(shape)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for matrix, _ in quantize_stack(weight, statistics, MethodSpec("gptq", format)):
        for device in devices:
            there = dequantized(matrix, device)
            assert there.device.type == device and there.cpu().numpy().tobytes() == matrix.dequantize().tobytes()


@pytest.mark.parametrize("format", [*FORMATS, IntFormat(3, 0, False), IntFormat(2, 16, half_step=True)],
                         ids=lambda f: f.name)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 4, 256), (2, 5, 70)])
def test_stacks_are_dequantized_at_once_or_one_by_one(format, shape):
    weight, statistics = problem(shape)
    matrices = [matrix for matrix, _ in quantize_stack(weight, statistics, MethodSpec("gptq", format))]
    apart = [dataclasses.replace(matrix, **{"codes" if hasattr(matrix, "codes") else "trits": codes_of(matrix).copy()})
             for matrix in matrices]  # fmt: skip
    wanted = np.stack([matrix.dequantize() for matrix in matrices])
    for some, order in [(matrices, wanted), (apart, wanted), (matrices[::-1], wanted[::-1])]:
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            out = torch.full(shape, torch.nan, device=device)
            dequantize(some, out)
            assert out.cpu().numpy().tobytes() == np.ascontiguousarray(order).tobytes()
    dequantize([], torch.empty(0, 3, 4))


def codes_of(matrix):
    return matrix.codes if hasattr(matrix, "codes") else matrix.trits
