"""Quantizers against straightforward float64 references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_core.errors import QmoeError
from qmoe_core.formats import SCALE_DTYPES, IntFormat, IntMatrix, PackedTensor, TernaryFormat
from qmoe_core.quantize import METHODS, MethodSpec, default_method, quantize, quantize_stack
from qmoe_core.quantize.granularity import GROUPS

SHAPES = [(1, 1), (3, 5), (8, 32), (7, 200), (16, 256), (5, 129)]

DATA_FREE = [name for name, info in METHODS.items() if not info.needs_statistics]


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * 0.05


def spec_of(method: str, **changes: object) -> MethodSpec:
    """A spec that the method accepts."""
    info = METHODS[method]
    if info.format is TernaryFormat:
        return MethodSpec(method, TernaryFormat(**changes))
    whole = {"group": 0, "zero_point": False} if info.whole_row else {}
    return MethodSpec(method, IntFormat(**{"bits": 4, **whole, **changes}))


def reference_int(weight: np.ndarray, format: IntFormat) -> tuple[np.ndarray, np.ndarray]:
    """Round to nearest in float64 with unrounded scales, group by group: (dequantized (N, K), step (N, K))."""
    weight = weight.astype(np.float64)
    result, steps = np.empty_like(weight), np.empty_like(weight)
    group = format.group or weight.shape[1]
    levels = 2**format.bits - 1
    half = 0.5 if format.half_step else 0.0
    for first in range(0, weight.shape[1], group):
        part = weight[:, first : first + group]
        if format.zero_point:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = np.where(high > low, (high - low) / levels, 1.0)[:, None]
            zero = np.round(-low[:, None] / scale - half) + half
            codes = np.clip(np.round(part / scale + zero), 0, levels)
            result[:, first : first + group] = scale * (codes - zero)
        elif format.half_step:
            scale = np.abs(part).max(1)[:, None] / (levels / 2)
            scale = np.where(scale > 0, scale, 1.0)
            result[:, first : first + group] = scale * (
                np.clip(np.round(part / scale + levels / 2), 0, levels) - levels / 2
            )
        else:
            longer = 2 ** (format.bits - 1)  # the largest weight takes the longer side of the grid, code 0
            largest = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)
            scale = np.where(largest != 0, -largest / longer, 1.0)
            result[:, first : first + group] = scale * np.clip(np.round(part / scale), -longer, longer - 1)
        steps[:, first : first + group] = np.abs(scale)
    return result, steps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("half_step", [True, False])
def test_rtn_is_as_good_as_the_float64_reference(shape, bits, group, zero_point, half_step):
    format = IntFormat(bits, group, zero_point, half_step=half_step)
    weight = weights(*shape)
    matrix, report = quantize(weight, MethodSpec("rtn", format))
    array = weight.numpy().astype(np.float64)
    reference, step = reference_int(array, format)
    error, best = np.abs(array - matrix.dequantize()), np.abs(array - reference)
    # Rounding the scale to float16 moves a code by at most 2^bits steps * 2^-11. A zero point near .5 may round the
    # other way for it, which no bound against the reference can know; half a step holds all the same, since the grid
    # covers the group.
    moved = step * 2.0**bits * 2**-11 + 1e-12
    assert (error <= (0.5 * step if zero_point else best) + moved).all()
    assert np.linalg.norm(error) <= np.linalg.norm(best) * 1.05 + np.linalg.norm(moved)
    assert report.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(array), rel=1e-6)
    assert report.formats == {format.name: 1} and report.weights == weight.numel()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_half_steps_have_as_many_levels_above_zero_as_below_and_none_at_zero(bits, zero_point):
    even = torch.arange(2**bits) - (2**bits - 1) / 2  # -1.5, -0.5, 0.5, 1.5: exactly the levels of the grid
    matrix, report = quantize(even.repeat(4, 1), MethodSpec("rtn", IntFormat(bits, 0, zero_point, half_step=True)))
    assert (matrix.codes == np.arange(2**bits)).all() and (matrix.scales == 1).all()
    assert report.relative_error == 0.0 and report.zeros == 0
    assert (matrix.zeros == 2 ** (bits - 1) - 1).all() if zero_point else matrix.zeros is None


@pytest.mark.parametrize(("half_step", "least"), [(False, 0.149), (True, 0.119)])
def test_half_steps_suit_two_bits(half_step, least):
    """The mean square error of Gaussian weights of variance 1 on the grid of the best scale, as FORMAT.md says."""
    weight = np.random.default_rng(0).standard_normal((1, 400_000)).astype(np.float32)
    format = IntFormat(2, 0, False, "float32", half_step)
    zero = 2 + format.zero_offset
    errors = []
    for scale in np.arange(0.8, 1.3, 0.02, dtype=np.float32):
        codes = np.clip(np.round(weight / scale + zero), 0, 3).astype(np.uint8)
        matrix = IntMatrix(format, codes, np.full((1, 1), scale, np.float32))
        errors.append(np.square(weight - matrix.dequantize()).mean())
    assert min(errors) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_half_steps_reach_weights_that_all_lie_on_one_side(side, zero_point):
    weight = side * (weights(8, 64).abs() + 0.01)
    format = IntFormat(4, 16, zero_point, "float32", half_step=True)
    matrix, _ = quantize(weight, MethodSpec("rtn", format))
    step = matrix.scales.repeat(16, axis=1)
    assert (np.abs(weight.numpy() - matrix.dequantize()) <= 0.5001 * step).all()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-44])
def test_groups_that_vanish_become_exact_zeros_in_half_steps_too(scale_dtype, zero_point, size):
    weight = weights(2, 64)
    weight[:, 16:32] = size
    matrix, _ = quantize(weight, MethodSpec("rtn", IntFormat(2, 16, zero_point, scale_dtype, half_step=True)))
    assert (np.abs(matrix.dequantize()[:, 16:32]) <= 2 * size).all() and (matrix.dequantize()[:, :16] != 0).all()
    packed = PackedTensor.pack([matrix])
    packed.verify()
    np.testing.assert_array_equal(packed.decode(0), matrix.dequantize())


def test_moqe_is_symmetric_rtn_per_row():
    weight = weights(16, 200)
    format = IntFormat(4, 0, False)
    moqe, _ = quantize(weight, MethodSpec("moqe", format))
    rtn, _ = quantize(weight, MethodSpec("rtn", format))
    assert moqe.scales.shape == (16, 1) and moqe.zeros is None
    np.testing.assert_array_equal(moqe.codes, rtn.codes)


@pytest.mark.parametrize("format", [IntFormat(4, 128, False), IntFormat(4, 0, True)])
def test_moqe_refuses_groups_and_zero_points(format):
    with pytest.raises(QmoeError) as error:
        quantize(weights(4, 256), MethodSpec("moqe", format))
    assert error.value.code == "E_VALUE"


def test_finequant_keeps_whole_rows_where_they_do_and_refines_where_outliers_spoil_them():
    even = torch.rand(32, 512, generator=torch.Generator().manual_seed(0)) - 0.5  # uniform: groups gain next to nothing
    spiky = even * 0.01
    spiky[:, ::64] = 1.0  # an outlier in every group of 64: only groups of 32 keep half of the weights clear of it
    spec = MethodSpec("finequant", IntFormat(4))
    assert quantize(even, spec)[0].format.group == 0
    assert quantize(spiky, spec)[0].format.group == 32


@given(seed=st.integers(0, 10**6), ratio=st.floats(1.0, 2.0), spread=st.floats(0.0, 3.0))
@settings(max_examples=25, deadline=None)
def test_finequant_takes_the_coarsest_group_within_the_ratio(seed, ratio, spread):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 256, generator=generator) * torch.exp(spread * torch.randn(1, 256, generator=generator))
    matrix, report = quantize(weight, MethodSpec("finequant", IntFormat(3), {"max_error_ratio": ratio}))
    errors = {g: quantize(weight, MethodSpec("rtn", IntFormat(3, g)))[1].relative_error for g in (0, *GROUPS)}
    fitting = [group for group in (0, *GROUPS) if errors[group] <= ratio * errors[32]]
    assert matrix.format.group == fitting[0]
    assert report.relative_error == errors[fitting[0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_minmax_is_the_qmoe_grid(shape):
    weight = weights(*shape)
    matrix, report = quantize(weight, spec_of("ternary-minmax"))
    array = weight.numpy().astype(np.float64)
    high, low = np.maximum(array.max(1, keepdims=True), 0), np.minimum(array.min(1, keepdims=True), 0)
    expected = np.where(array > high / 2, 1, np.where(array < low / 2, -1, 0))
    np.testing.assert_array_equal(matrix.trits, expected)
    np.testing.assert_allclose(matrix.levels, np.concatenate([low, high], 1), rtol=2**-8)
    assert report.zeros == weight.numel() - np.count_nonzero(matrix.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.7, 1.2])
def test_centroids_are_the_means_of_what_is_kept(shape, threshold):
    weight = weights(*shape)
    spec = MethodSpec("ternary-centroid", TernaryFormat(), {"threshold": threshold})
    matrix, _ = quantize(weight, spec)
    for row, trits, (low, high) in zip(weight.numpy().astype(np.float64), matrix.trits, matrix.levels, strict=True):
        cut = threshold * np.abs(row).mean()
        np.testing.assert_array_equal(trits, np.where(row > cut, 1, np.where(row < -cut, -1, 0)))
        for level, kept in ((high, row[trits > 0]), (low, row[trits < 0])):
            assert level == pytest.approx(kept.mean() if kept.size else 0.0, rel=2**-8)


def test_symmetric_levels_mirror_each_other():
    weight = weights(8, 300)
    for method in ("ternary-minmax", "ternary-centroid"):
        matrix, _ = quantize(weight, spec_of(method, levels="symmetric"))
        assert matrix.levels.shape == (8, 1) and (matrix.levels >= 0).all()
        values = matrix.dequantize()
        assert all(
            set(np.unique(row)) <= {-level, 0, level} for row, level in zip(values, matrix.levels[:, 0], strict=True)
        )


@pytest.mark.parametrize("method", DATA_FREE)
def test_work_in_blocks_of_rows_gives_what_the_rows_alone_give(method):
    weight = weights(2500, 1000)  # three blocks
    spec = spec_of(method)
    whole, report = quantize(weight, spec)
    parts = [quantize(rows, dataclasses.replace(spec, format=whole.format)) for rows in weight.split(700)]
    if method != "finequant":
        np.testing.assert_array_equal(whole.dequantize(), np.concatenate([matrix.dequantize() for matrix, _ in parts]))
        assert report.zeros == sum(part.zeros for _, part in parts)
    exact = np.linalg.norm(weight.numpy().astype(np.float64) - whole.dequantize()) / np.linalg.norm(weight.double())
    assert report.relative_error == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_record_decodes_to_the_quantized_weights(method, shape):
    pairs = [quantize(weights(*shape, seed=seed), spec_of(method)) for seed in range(3)]
    packed = PackedTensor.pack([matrix for matrix, _ in pairs])
    packed.verify()
    for expert, (matrix, _) in enumerate(pairs):
        np.testing.assert_array_equal(packed.decode(expert), matrix.dequantize())


@pytest.mark.parametrize("method", DATA_FREE)
def test_zero_weights_stay_zero(method):
    matrix, report = quantize(torch.zeros(4, 96), spec_of(method))
    assert not matrix.dequantize().any()
    assert report.relative_error == 0.0 and report.zeros == 4 * 96
    PackedTensor.pack([matrix]).verify()


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_by_name_and_place(method, bad):
    weight = weights(4, 64)
    weight[2, 5] = bad
    with pytest.raises(QmoeError, match="row 2, column 5") as error:
        quantize(weight, spec_of(method), tensor="layers.3.w")
    assert (error.value.code, error.value.tensor) == ("E_VALUE", "layers.3.w")


@pytest.mark.parametrize(
    ("weight", "spec", "code"),
    [
        (weights(2, 32).double(), MethodSpec("rtn", IntFormat(4)), "E_DTYPE"),
        (weights(2, 32)[0], MethodSpec("rtn", IntFormat(4)), "E_SHAPE"),
        (weights(2, 32)[:0], MethodSpec("rtn", IntFormat(4)), "E_SHAPE"),
        (weights(2, 32), MethodSpec("rtx", IntFormat(4)), "E_UNKNOWN"),
        (weights(2, 32), MethodSpec("rtn", IntFormat(4), {"damp": 0.1}), "E_UNKNOWN"),
        (weights(2, 32), MethodSpec("rtn", TernaryFormat()), "E_VALUE"),
        (weights(2, 32), MethodSpec("ternary-minmax", IntFormat(4)), "E_VALUE"),
        (weights(2, 32), MethodSpec("ternary-centroid", TernaryFormat(), {"threshold": -1.0}), "E_VALUE"),
        (weights(2, 32), MethodSpec("ternary-centroid", TernaryFormat(), {"threshold": True}), "E_VALUE"),
        (weights(2, 32), MethodSpec("finequant", IntFormat(4), {"max_error_ratio": 0.5}), "E_VALUE"),
    ],
)
def test_refusals(weight, spec, code):
    with pytest.raises(QmoeError) as error:
        quantize(weight, spec)
    assert error.value.code == code


def test_a_calibrated_method_is_refused_without_statistics():
    spec = MethodSpec("gptq", IntFormat(4))
    for refused in (lambda: quantize(weights(2, 32), spec), lambda: quantize_stack(weights(2, 32)[None], None, spec)):
        with pytest.raises(QmoeError, match="statistics") as error:
            refused()
        assert error.value.code == "E_VALUE"


def test_reports_add_up_over_a_stack():
    pairs = [quantize(weights(8, 64, seed), spec_of("rtn", bits=bits)) for seed, bits in ((0, 4), (1, 2))]
    total = pairs[0][1] + pairs[1][1]
    stacked = np.stack([weights(8, 64, seed).numpy().astype(np.float64) for seed in (0, 1)])
    quantized = np.stack([matrix.dequantize() for matrix, _ in pairs])
    assert total.relative_error == pytest.approx(
        np.linalg.norm(stacked - quantized) / np.linalg.norm(stacked), rel=1e-6
    )
    assert total.formats == {"int4-g128": 1, "int2-g128": 1}


def test_default_methods_fit_their_formats():
    for format in (IntFormat(4), TernaryFormat()):
        assert isinstance(format, METHODS[default_method(format)].format)
