"""Layers of int experts on a GPU against float64: gates, biases, skewed routing, ids of other ranks, poisoned outputs,
two identical runs, and CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from products import Layer, OnDevice  # noqa: E402

from qmoe_core.runtime.gating import Gating  # noqa: E402


def stack(bits: int, group: int, zero_point: bool, experts: int, rows: int, cols: int, seed: int) -> PackedTensor:
    rng = np.random.default_rng(seed)
    format = IntFormat(bits, group, zero_point, "float16")
    matrices = []
    for _ in range(experts):
        weight = (rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32)
        codes, scales, zeros = _C.rtn_int(weight, bits, group, zero_point, "float16", False)
        matrices.append(IntMatrix(format, codes, scales, zeros))
    return PackedTensor.pack(matrices)


def layer_of(
    experts: int,
    hidden: int,
    width: int,
    gating: Gating,
    bits: tuple[int, int] = (4, 4),
    group: int = 128,
    zero_point: bool = False,
    biased: bool = False,
    dtype: str = "bfloat16",
    kernel: str = "auto",
) -> Layer:
    rows = width * (1 if gating.order == "plain" else 2)
    shape = group, zero_point, experts
    return Layer(
        stack(bits[0], *shape, rows, hidden, 1), stack(bits[1], *shape, hidden, width, 2), gating, biased, dtype,
        kernel,
    )  # fmt: skip


HALVES, INTERLEAVED = Gating("halves"), Gating("interleaved", "silu", True, 1.702, 7.0)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("gating", [HALVES, INTERLEAVED, Gating("plain", "relu"), Gating("halves", "gelu_tanh")])
def test_it_is_the_layer(tokens: int, gating: Gating) -> None:
    layer_of(7, 200, 136, gating, biased=tokens % 2 == 1).check(tokens, 3, tokens)


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 2), (8, 3)])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_formats_may_differ(bits: tuple[int, int], group: int) -> None:
    layer_of(5, 129, 77, HALVES, bits, group, True, dtype="float16").check(13, 2, 2)


@pytest.mark.parametrize("tokens", [1, 9, 40, 300])
@pytest.mark.parametrize("gating", [HALVES, INTERLEAVED, Gating("plain", "relu")])
def test_it_is_the_layer_of_many_tokens(tokens: int, gating: Gating) -> None:
    layer_of(7, 200, 136, gating, biased=tokens % 2 == 1, kernel="many").check(tokens, 3, tokens)
    layer_of(3, 500, 300, gating, (2, 3), 64, True, dtype="float16", kernel="many").check(tokens, 2, tokens)


@pytest.mark.parametrize("kernel", ["few", "many"])
def test_all_tokens_for_one_expert_and_none_for_any(kernel: str) -> None:
    layer = layer_of(6, 256, 128, HALVES, kernel=kernel)
    layer.check(40, 1, 1, torch.full((40, 1), 5))
    layer.check(5, 2, 2, torch.full((5, 2), -1))
    layer.check(30, 2, 3, torch.tensor([[0, 6], [-1, 2], [2, 3]]).repeat(10, 1))
    layer.check(1, 6, 4, torch.arange(6).view(1, 6))


@pytest.mark.parametrize("biased", [False, True])
def test_blocks_of_threads_that_have_all_experts(biased: bool) -> None:
    """As many tiles of the second projection as multiprocessors share almost evenly, and few tokens."""
    tiles = torch.cuda.get_device_properties(0).multi_processor_count
    for hidden, bits, group in [(16 * tiles, 4, 128), (16 * tiles - 5, 2, 0), (32 * tiles - 40, 3, 32)]:
        layer = layer_of(5, hidden, 72, HALVES, (bits, bits), group, bits != 4, biased)
        for tokens in (1, 4, 8):
            layer.check(tokens, 3, tokens)
        layer.check(2, 3, 5, torch.tensor([[1, 1, 4], [4, -1, 4]]))
        layer.check(3, 2, 6, torch.full((3, 2), -1))


def test_shapes_of_models() -> None:
    layer_of(16, 2048, 768, HALVES, (2, 2)).check(16, 8, 0)
    layer_of(3, 4096, 1792, HALVES).check(17, 2, 0)
    layer_of(200, 512, 64, HALVES).check(64, 8, 0)


def test_random_layers() -> None:
    rng = np.random.default_rng(0)
    gatings = [HALVES, INTERLEAVED, Gating("interleaved", "gelu"), Gating("plain", "silu")]
    for seed in range(60):
        experts = int(rng.integers(1, 20))
        layer = layer_of(
            experts,
            int(rng.integers(1, 600)),
            int(rng.integers(1, 300)),
            gatings[int(rng.integers(4))],
            (int(rng.choice([2, 3, 4, 8])), int(rng.choice([2, 3, 4, 8]))),
            int(rng.choice([0, 32, 64, 128])),
            bool(rng.integers(2)),
            bool(rng.integers(2)),
            str(rng.choice(["float16", "bfloat16"])),
        )
        layer.check(int(rng.integers(1, 50)), int(rng.integers(1, min(8, experts) + 1)), seed)


def test_a_captured_graph_follows_its_inputs() -> None:
    layer_of(7, 256, 128, HALVES).check_graph(4, 2)


def test_what_cannot_be() -> None:
    first, second = (
        OnDevice(stack(4, 64, False, 3, 64, 100, 0), "halves"),
        OnDevice(stack(4, 64, False, 3, 90, 32, 0)),
    )
    with pytest.raises(QmoeError, match="E_SHAPE"):
        _C.CudaIntExperts(first.matrix, second.matrix, "silu").workspace(1, 1)
    with pytest.raises(QmoeError, match="E_VALUE"):
        _C.CudaIntExperts(first.matrix, second.matrix, "tanh")
    for kernel, tokens in (("few", 5000), ("many", 70000), ("auto", 70000)):
        with pytest.raises(QmoeError, match="E_NO_KERNEL"):
            layer_of(3, 64, 32, HALVES, kernel=kernel).call.workspace(tokens, 1)
