"""Products of ternary matrices on a GPU against float64: every density, ragged shapes, layers of experts, CUDA graphs,
poisoned outputs, two identical runs; and what is in their layout against the CPU's decoder, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from test_cuda_library import SHAPES, int_record

from qmoe_core import _C, PackedTensor, QmoeError, TernaryFormat, TernaryMatrix

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from products import Layer, Linear, OnDevice, check_linear  # noqa: E402

from qmoe_core.runtime.gating import Gating  # noqa: E402

DENSITIES = [0.0, 0.42, 0.8, 0.885, 0.95, 0.99, 1.0]  # of zeros
HALVES, INTERLEAVED = Gating("halves"), Gating("interleaved", "silu", True, 1.702, 7.0)


def stack(zeros: float, experts: int, rows: int, cols: int, seed: int, levels: str = "pair") -> PackedTensor:
    rng = np.random.default_rng(seed)
    share = (1 - zeros) / 2
    size = np.float32(max(share * cols, 1) ** -0.5)
    matrices = []
    for _ in range(experts):
        trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, cols), p=[share, zeros, share])
        values = rng.integers(64, 128, (rows, 2)).astype(np.float32) / 64 * [-1, 1] * 2.0 ** np.round(np.log2(size))
        values = values[:, 1:] if levels == "symmetric" else values
        matrices.append(TernaryMatrix(TernaryFormat(levels), trits, values.astype(np.float32)))
    return PackedTensor.pack(matrices)


def layer_of(
    experts: int, hidden: int, width: int, gating: Gating, zeros: tuple[float, float] = (0.885, 0.885),
    biased: bool = False, dtype: str = "bfloat16", kernel: str = "auto",
) -> Layer:  # fmt: skip
    rows = width * (1 if gating.order == "plain" else 2)
    return Layer(
        stack(zeros[0], experts, rows, hidden, 1), stack(zeros[1], experts, hidden, width, 2), gating, biased, dtype,
        kernel,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", DENSITIES)
@pytest.mark.parametrize("levels", ["pair", "symmetric"])
def test_the_layout_holds_the_matrix(shape: tuple[int, int], zeros: float, levels: str) -> None:
    packed = stack(zeros, 3, *shape, seed=0, levels=levels)
    there = OnDevice(packed)
    for expert in range(3):
        expected = torch.from_numpy(packed.decode(expert))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(there.unpack(expert, dtype).cpu(), expected.to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", DENSITIES)
def test_it_is_the_product(shape: tuple[int, int], zeros: float) -> None:
    packed = stack(zeros, 1, *shape, seed=1)
    for tokens, dtype in [(1, "bfloat16"), (2, "float16"), (4, "bfloat16"), (7, "bfloat16"), (8, "float16")]:
        check_linear(packed, tokens, dtype, seed=tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", DENSITIES)
def test_it_is_the_product_of_many_tokens(shape: tuple[int, int], zeros: float) -> None:
    packed = stack(zeros, 1, *shape, seed=1)
    for tokens, dtype in [(1, "bfloat16"), (16, "float16"), (17, "bfloat16"), (64, "bfloat16"), (100, "float16")]:
        check_linear(packed, tokens, dtype, tokens, kernel="many")
    check_linear(packed, 700, "bfloat16", 700, biased=True, kernel="many")


@pytest.mark.parametrize("tokens", [5, 8, 9, 16, 33])
@pytest.mark.parametrize(
    "shape", [(133, 1201), (47, 88), (300, 2048), (20000, 136), (14336, 4096), (500, 4400), (70, 9000)]
)
def test_tokens_that_become_one_product(shape: tuple[int, int], tokens: int) -> None:
    """Streams as codes in shared memory: batches of strips, unaligned rows, columns that there is no room for."""
    packed = stack(0.885, 1, *shape, seed=4)
    check_linear(packed, tokens, "bfloat16", tokens, biased=True, kernel="few")
    check_linear(packed, tokens, "float16", tokens + 1, kernel="few")
    if shape[0] < 1000:
        for zeros in (0.2, 0.99):
            check_linear(stack(zeros, 1, *shape, seed=5), tokens, "bfloat16", tokens, kernel="few")


def test_many_tokens_of_matrices_that_are_cut() -> None:
    """Few windows of rows, long ones: several blocks of threads share each."""
    for shape in [(128, 14336), (1000, 9000), (260, 50000), (4096, 4096)]:
        for tokens in (16, 30):
            check_linear(stack(0.885, 1, *shape, seed=2), tokens, "bfloat16", 0, biased=tokens == 30, kernel="many")
    check_linear(stack(0.885, 1, 300, 500, seed=2), 5000, "float16", 0, biased=True, kernel="many")  # two launches


@pytest.mark.parametrize("shape", [(300, 14336), (40, 40000), (9000, 130), (1, 50000)])
def test_long_rows_and_many(shape: tuple[int, int]) -> None:
    """More columns than there is room for activations of 8 tokens, or of 4; more rows than warps."""
    for tokens in (1, 4, 11):
        check_linear(stack(0.885, 1, *shape, seed=2), tokens, "bfloat16", 0)


def test_random_configurations() -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        shape = int(rng.integers(1, 700)), int(rng.integers(1, 3000))
        packed = stack(float(rng.choice(DENSITIES)), 1, *shape, seed, str(rng.choice(["pair", "symmetric"])))
        dtype = str(rng.choice(["float16", "bfloat16"]))
        tokens, kernel = int(rng.integers(1, 20)), str(rng.choice(["few", "many"]))
        check_linear(packed, tokens, dtype, seed, biased=bool(rng.integers(2)), kernel=kernel)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("gating", [HALVES, INTERLEAVED, Gating("plain", "relu"), Gating("halves", "gelu_tanh")])
def test_it_is_the_layer(tokens: int, gating: Gating) -> None:
    layer_of(7, 200, 136, gating, biased=tokens % 2 == 1).check(tokens, 3, tokens)


@pytest.mark.parametrize("zeros", [(0.95, 0.8), (0.3, 0.99), (1.0, 0.885), (0.885, 1.0)])
def test_projections_may_differ(zeros: tuple[float, float]) -> None:
    for tokens in (1, 13):
        layer_of(5, 129, 77, HALVES, zeros, dtype="float16", biased=True).check(tokens, 2, 2)


@pytest.mark.parametrize("tokens", [1, 30, 300])
@pytest.mark.parametrize("gating", [HALVES, INTERLEAVED, Gating("plain", "relu")])
def test_layers_of_many_tokens(tokens: int, gating: Gating) -> None:
    layer_of(7, 200, 136, gating, biased=tokens == 30, kernel="many").check(tokens, 3, tokens)
    layer_of(5, 300, 130, gating, (0.95, 0.6), biased=tokens == 30, kernel="many", dtype="float16").check(tokens, 2, 1)


def test_all_tokens_for_one_expert_and_none_for_any() -> None:
    layer = layer_of(6, 256, 128, HALVES)
    layer.check(40, 1, 1, torch.full((40, 1), 5))
    layer.check(5, 2, 2, torch.full((5, 2), -1))
    layer.check(30, 2, 3, torch.tensor([[0, 6], [-1, 2], [2, 3]]).repeat(10, 1))
    layer.check(1, 6, 4, torch.arange(6).view(1, 6))


def test_shapes_of_models() -> None:
    layer_of(16, 2048, 768, HALVES).check(16, 8, 0)
    layer_of(3, 4096, 1792, HALVES).check(17, 2, 0)
    layer_of(200, 512, 64, HALVES).check(64, 8, 0)
    layer_of(16, 2048, 768, HALVES, kernel="many").check(200, 8, 0)
    layer_of(200, 512, 64, HALVES, kernel="many").check(600, 8, 0)


def test_random_layers() -> None:
    rng = np.random.default_rng(0)
    gatings = [HALVES, INTERLEAVED, Gating("interleaved", "gelu"), Gating("plain", "silu")]
    for seed in range(60):
        experts = int(rng.integers(1, 20))
        layer = layer_of(
            experts, int(rng.integers(1, 600)), int(rng.integers(1, 300)), gatings[int(rng.integers(4))],
            (float(rng.choice(DENSITIES)), float(rng.choice(DENSITIES))), bool(rng.integers(2)),
            str(rng.choice(["float16", "bfloat16"])), str(rng.choice(["few", "many"])),
        )  # fmt: skip
        layer.check(int(rng.integers(1, 50)), int(rng.integers(1, min(8, experts) + 1)), seed)


def test_a_captured_graph_follows_its_inputs() -> None:
    for kernel in ("few", "many"):
        layer_of(7, 256, 128, HALVES, kernel=kernel).check_graph(4, 2)


def test_what_cannot_be() -> None:
    linear = Linear(stack(0.885, 1, 33, 129, 0))
    assert linear(torch.empty(0, 129, dtype=torch.bfloat16, device="cuda")).shape == (0, 33)
    with pytest.raises(QmoeError, match="E_DTYPE"):
        linear(torch.zeros(1, 129, device="cuda"))
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        _C.CudaTernary(int_record(4, 128, True, 8, 256).data)
    with pytest.raises(QmoeError, match="E_SHAPE"):
        _C.CudaTernary(stack(0.885, 1, 33, 129, 0).data, "halves")
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):  # a block's shared memory holds no row of activations
        Linear(stack(0.885, 1, 1, 62000, 0))(torch.zeros(1, 62000, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(QmoeError, match="E_VALUE"):
        linear.matrix.take()
    first, second = OnDevice(stack(0.8, 3, 64, 100, 0), "halves"), OnDevice(stack(0.8, 3, 90, 32, 0))
    with pytest.raises(QmoeError, match="E_SHAPE"):
        _C.CudaTernaryExperts(first.matrix, second.matrix, "silu").workspace(1, 1)
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        layer_of(3, 64, 32, HALVES, kernel="few").call.workspace(5000, 1)
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        layer_of(3, 64, 32, HALVES, kernel="many").call.workspace(66000, 1)
    with pytest.raises(QmoeError, match="E_VALUE"):
        linear(torch.zeros(1, 129, dtype=torch.bfloat16, device="cuda"), kernel="any")
