"""What the tests of products on a GPU share: stacks on the device, a linear layer and a layer of experts, each checked
against float64, with poisoned outputs between guards, twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from test_cuda_library import GUARD

from qmoe_core import _C, PackedTensor
from qmoe_core.runtime.gating import Gating

ERROR = {"bfloat16": 4e-3, "float16": 6e-4}  # of the output's rounding, most of it
# Of many tokens int weights are rounded to the activations' type (five standard deviations), and what their groups have
# in common: scales, and zeros that are not whole.
ROUNDING = {"bfloat16": (1e-2, 4e-3), "float16": (1.2e-3, 5e-4)}


class OnDevice:
    """A record in the layout of its products. `weights`: its bytes, behind a guard, on the device."""

    def __init__(self, packed: PackedTensor, order: str = "plain") -> None:
        self.packed, self.ternary = packed, packed.info["specs"][0]["format"] == "ternary"
        self.matrix = _C.CudaTernary(packed.data, order) if self.ternary else _C.CudaInt(packed.data, order)
        room = torch.full((self.matrix.bytes + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        self.weights = room.data_ptr() + GUARD
        if isinstance(self.matrix, _C.CudaTernary):
            room[GUARD:-GUARD] = torch.from_numpy(self.matrix.take()).cuda()
        else:
            record = torch.from_numpy(np.ascontiguousarray(packed.data)).cuda()
            self.matrix.prepack(record.data_ptr(), self.weights, self.matrix.bytes, stream())
        assert (torch.cat([room[:GUARD], room[-GUARD:]]) == 0xA5).all(), "wrote outside of the layout"
        self._room = room

    def dense(self) -> torch.Tensor:
        """(E, N, K) float64 by the CPU's decoder."""
        return torch.stack([torch.from_numpy(self.packed.decode(e)) for e in range(self.packed.experts)]).double()

    def unpack(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """(N, K) from the layout."""
        size = self.packed.rows * self.packed.cols
        out = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device="cuda")
        at = out.data_ptr() + GUARD * out.element_size()
        self.matrix.unpack(self.weights, expert, at, name_of(dtype), stream())
        torch.cuda.synchronize()
        assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "wrote outside the output"
        return out[GUARD:-GUARD].view(self.packed.rows, self.packed.cols)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Linear(OnDevice):
    """A record of one matrix."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, kernel: str = "auto") -> torch.Tensor:
        size = len(x) * self.packed.rows
        nbytes = self.matrix.linear_workspace(len(x), kernel)
        room = torch.full((nbytes + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
        out = torch.full((size + 2 * GUARD,), float("nan"), dtype=x.dtype, device="cuda")
        at = out.data_ptr() + GUARD * out.element_size()
        there = 0 if bias is None else bias.data_ptr()
        self.matrix.linear(
            self.weights, x.data_ptr(), there, at, len(x), name_of(x.dtype), stream(), room.data_ptr() + GUARD, nbytes,
            kernel,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert (room[:GUARD] == 0xFF).all() and (room[-GUARD:] == 0xFF).all(), "wrote outside the workspace"
        assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "wrote outside the output"
        return out[GUARD : GUARD + size].view(len(x), self.packed.rows)


def check_linear(
    packed: PackedTensor, tokens: int, dtype: str, seed: int, biased: bool = False, kernel: str = "auto"
) -> None:
    linear = Linear(packed)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, packed.cols, generator=generator) + 0.5).to(getattr(torch, dtype))
    bias = torch.randn(packed.rows, generator=generator).to(x.dtype) if biased else None
    weight = linear.dense()[0]
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ weight.abs().T + 1e-3  # errors are relative to the sum of magnitudes' square root and up
    there = x.cuda(), None if bias is None else bias.cuda(), kernel
    found = linear(*there)
    assert torch.equal(found, linear(*there))
    error = (found.cpu().double() - expected).abs()
    few = 8 if packed.cols > 8192 else 16  # tokens that "auto" takes the kernel for few for
    many = kernel == "many" or (kernel == "auto" and tokens > few)
    rounding = rounding_of_ints(packed, x.double(), weight, dtype) if many and not linear.ternary else 0
    assert (error <= ERROR[dtype] * expected.abs() + 1e-4 * scale + rounding).all(), float((error / scale).max())


def rounding_of_ints(packed: PackedTensor, x: torch.Tensor, weight: torch.Tensor, dtype: str) -> torch.Tensor:
    each, common = ROUNDING[dtype]
    group = packed.info["specs"][0]["group"] or packed.cols
    sums = sum((a @ b.T).abs() for a, b in zip(x.split(group, 1), weight.split(group, 1), strict=True))
    return each * (x**2 @ weight.T**2).sqrt() + common * sums


@dataclass
class Layer:
    """A layer of experts. first, second: records of the projections, both int or both ternary."""

    first: PackedTensor
    second: PackedTensor
    gating: Gating
    biased: bool = False
    dtype: str = "bfloat16"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        self.experts, self.hidden = self.first.experts, self.first.cols
        self.stacks = OnDevice(self.first, self.gating.order), OnDevice(self.second)
        self.dense = tuple(stack.dense() for stack in self.stacks)
        gate, make = self.gating, _C.CudaTernaryExperts if self.stacks[0].ternary else _C.CudaIntExperts
        matrices = (stack.matrix for stack in self.stacks)
        self.call = make(*matrices, gate.activation, gate.clamped, gate.alpha, gate.limit, self.kernel)
        generator = torch.Generator().manual_seed(3)
        self.type = getattr(torch, self.dtype)
        self.biases = [
            torch.randn(self.experts, n, generator=generator).to(self.type) if self.biased else None
            for n in (self.first.rows, self.second.rows)
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
            self.stacks[0].weights, self.stacks[1].weights, *biases, x.data_ptr(), self.dtype, tokens,
            ids.data_ptr(), weights.data_ptr(), name_of(weights.dtype), top_k,
            out.data_ptr() + GUARD * out.element_size(), workspace.data_ptr() + GUARD, bytes, stream(),
        )  # fmt: skip
        self.guards = out, workspace
        return out[GUARD : GUARD + x.numel()].view(x.shape)

    def is_for_many(self, choices: int) -> bool:
        """Which kernel a call gets."""
        few = 8 if self.stacks[0].ternary else 7 if self.first.rows * self.first.cols < 2**24 else 4
        return self.kernel == "many" or (self.kernel == "auto" and choices > min(few * self.experts, 1024))

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
                h = self.dense[0][e] @ x[t].double()
                if self.biases[0] is not None:
                    h = h + self.biases[0][e].double()
                h = self.gating(h.unsqueeze(0))[0].to(self.type).double()  # as the kernels keep it
                y = self.dense[1][e] @ h
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
        error = (found.cpu().double() - expected).abs()
        # Products of gate and up have long tails: a token's own size, where that is more than the usual one.
        size = expected.square().mean(1, keepdim=True).sqrt().clamp_min(float(expected.square().mean().sqrt()))
        # Of many tokens int weights are rounded, and what each choice adds: up to 2.6e-2 in bfloat16 by that alone.
        few, many = {"bfloat16": (1.5e-2, 3e-2), "float16": (2e-3, 4e-3)}[self.dtype]
        limit = many if self.is_for_many(ids.numel()) else few
        assert (error <= limit * (expected.abs() + size)).all(), float((error / size).max())

    def check_graph(self, tokens: int, top_k: int) -> None:
        """A captured graph follows its inputs."""
        x = torch.randn(tokens, self.hidden, device="cuda").to(self.type)
        ids = torch.randint(0, self.experts, (tokens, top_k), device="cuda")
        weights = torch.rand(tokens, top_k, device="cuda")
        self.run(x, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.run(x, ids, weights)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x.copy_(torch.randn(tokens, self.hidden, generator=generator))
            ids.copy_(torch.randint(-1, self.experts + 1, (tokens, top_k), generator=generator))
            graph.replay()
            torch.cuda.synchronize()
            expected = self.reference(x.cpu(), ids.cpu(), weights.cpu())
            assert (found.cpu().double() - expected).abs().max() <= 1.5e-2 * (expected.abs().max() + 1e-6)
