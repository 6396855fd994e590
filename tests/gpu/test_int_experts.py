"""Layers of int experts on a GPU against float64: gates, biases, skewed routing, ids of other ranks, poisoned outputs,
two identical runs, and CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from test_cuda_library import GUARD

from qmoe_core import _C, IntFormat, IntMatrix, PackedTensor, QmoeError

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

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


class OnDevice:
    def __init__(self, packed: PackedTensor, order: str) -> None:
        record = torch.from_numpy(np.ascontiguousarray(packed.data)).cuda()
        self.matrix = _C.CudaInt(packed.data, order)
        self.tiles = torch.empty(self.matrix.bytes, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        self.matrix.prepack(record.data_ptr(), self.tiles.data_ptr(), self.matrix.bytes, stream)
        self.dense = torch.stack([torch.from_numpy(packed.decode(e)) for e in range(packed.experts)]).double()


@dataclass
class Layer:
    experts: int
    hidden: int
    width: int
    gating: Gating
    bits: tuple[int, int] = (4, 4)
    group: int = 128
    zero_point: bool = False
    biased: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        rows = self.width * (1 if self.gating.order == "plain" else 2)
        shape = self.group, self.zero_point, self.experts
        self.first = OnDevice(stack(self.bits[0], *shape, rows, self.hidden, 1), self.gating.order)
        self.second = OnDevice(stack(self.bits[1], *shape, self.hidden, self.width, 2), "plain")
        gate = self.gating
        self.call = _C.CudaIntExperts(
            self.first.matrix, self.second.matrix, gate.activation, gate.clamped, gate.alpha, gate.limit
        )
        generator = torch.Generator().manual_seed(3)
        self.type = getattr(torch, self.dtype)
        self.biases = [
            torch.randn(self.experts, n, generator=generator).to(self.type) if self.biased else None
            for n in (rows, self.hidden)
        ]
        self.biases_there = [None if bias is None else bias.cuda() for bias in self.biases]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Device tensors in; poisoned output and workspace between guards."""
        tokens, top_k = ids.shape
        out = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype, device="cuda")
        bytes = self.call.workspace(tokens, top_k)
        workspace = torch.full((bytes + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
        biases = [0 if bias is None else bias.data_ptr() for bias in self.biases_there]
        self.call.run(
            self.first.tiles.data_ptr(), self.second.tiles.data_ptr(), *biases, x.data_ptr(), self.dtype, tokens,
            ids.data_ptr(), weights.data_ptr(), str(weights.dtype).removeprefix("torch."), top_k,
            out.data_ptr() + GUARD * out.element_size(), workspace.data_ptr() + GUARD, bytes,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        self.guards = out, workspace
        return out[GUARD : GUARD + x.numel()].view(x.shape)

    def check_guards(self) -> None:
        out, workspace = self.guards
        assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "wrote outside the output"
        assert (workspace[:GUARD] == 0xFF).all() and (workspace[-GUARD:] == 0xFF).all(), "wrote outside the workspace"

    def reference(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t in range(len(x)):
            for j, e in enumerate(ids[t].tolist()):
                if not 0 <= e < self.experts:
                    continue
                h = self.first.dense[e] @ x[t].double()
                if self.biases[0] is not None:
                    h = h + self.biases[0][e].double()
                h = self.gating(h.unsqueeze(0))[0].to(self.type).double()  # as the kernels keep it
                y = self.second.dense[e] @ h
                if self.biases[1] is not None:
                    y = y + self.biases[1][e].double()
                out[t] += weights[t, j].double() * y
        return out

    def check(self, tokens: int, top_k: int, seed: int, ids: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.hidden, generator=generator).to(self.type)
        if ids is None:
            ids = torch.stack([torch.randperm(self.experts, generator=generator)[:top_k] for _ in range(tokens)])
        weights = torch.rand(ids.shape, generator=generator)
        if seed % 2:
            weights = weights.to(self.type)
        expected = self.reference(x, ids, weights)
        there = x.cuda(), ids.cuda(), weights.cuda()
        found = self.run(*there)
        torch.cuda.synchronize()
        self.check_guards()
        again = self.run(*there)
        torch.cuda.synchronize()
        assert torch.equal(found, again)
        error, size = (found.cpu().double() - expected).abs(), expected.square().mean().sqrt()
        limit = 1.5e-2 if self.dtype == "bfloat16" else 2e-3
        assert (error <= limit * (expected.abs() + size)).all(), float((error / size).max())


HALVES, INTERLEAVED = Gating("halves"), Gating("interleaved", "silu", True, 1.702, 7.0)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("gating", [HALVES, INTERLEAVED, Gating("plain", "relu"), Gating("halves", "gelu_tanh")])
def test_it_is_the_layer(tokens: int, gating: Gating) -> None:
    Layer(7, 200, 136, gating, biased=tokens % 2 == 1).check(tokens, 3, tokens)


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 2), (8, 3)])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_formats_may_differ(bits: tuple[int, int], group: int) -> None:
    Layer(5, 129, 77, HALVES, bits, group, True, dtype="float16").check(13, 2, 2)


def test_all_tokens_for_one_expert_and_none_for_any() -> None:
    layer = Layer(6, 256, 128, HALVES)
    layer.check(40, 1, 1, torch.full((40, 1), 5))
    layer.check(5, 2, 2, torch.full((5, 2), -1))
    layer.check(30, 2, 3, torch.tensor([[0, 6], [-1, 2], [2, 3]]).repeat(10, 1))
    layer.check(1, 6, 4, torch.arange(6).view(1, 6))


def test_shapes_of_models() -> None:
    Layer(16, 2048, 768, HALVES, (2, 2)).check(16, 8, 0)
    Layer(3, 4096, 1792, HALVES).check(17, 2, 0)
    Layer(200, 512, 64, HALVES).check(64, 8, 0)


def test_random_layers() -> None:
    rng = np.random.default_rng(0)
    gatings = [HALVES, INTERLEAVED, Gating("interleaved", "gelu"), Gating("plain", "silu")]
    for seed in range(60):
        experts = int(rng.integers(1, 20))
        layer = Layer(
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
    layer = Layer(7, 256, 128, HALVES)
    x = torch.randn(4, 256, device="cuda").bfloat16()
    ids = torch.randint(0, 7, (4, 2), device="cuda")
    weights = torch.rand(4, 2, device="cuda")
    layer.run(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer.run(x, ids, weights)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(4, 256, generator=generator))
        ids.copy_(torch.randint(-1, 8, (4, 2), generator=generator))
        graph.replay()
        torch.cuda.synchronize()
        expected = layer.reference(x.cpu(), ids.cpu(), weights.cpu())
        assert (found.cpu().double() - expected).abs().max() <= 1.5e-2 * (expected.abs().max() + 1e-6)


def test_what_cannot_be() -> None:
    first, second = (
        OnDevice(stack(4, 64, False, 3, 64, 100, 0), "halves"),
        OnDevice(stack(4, 64, False, 3, 90, 32, 0), "plain"),
    )
    with pytest.raises(QmoeError, match="E_SHAPE"):
        _C.CudaIntExperts(first.matrix, second.matrix, "silu").workspace(1, 1)
    with pytest.raises(QmoeError, match="E_VALUE"):
        _C.CudaIntExperts(first.matrix, second.matrix, "tanh")
    layer = Layer(3, 64, 32, HALVES)
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        layer.call.workspace(5000, 1)
