"""PackedExperts and PackedLinear against the modules they replace, run with the decoded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_fixtures import FUSED, expert_modules, module_first, pack, pack_modules, tiny_model, unpack
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from qmoe_core.errors import QmoeError
from qmoe_core.runtime.experts import PackedExperts
from qmoe_core.runtime.linear import PackedLinear
from qmoe_core.runtime.packed import PackedShape


def pair(family: str) -> tuple[nn.Module, PackedExperts]:
    """The last layer's experts with decoded weights, and the packed module in their place."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    packed = pack_modules(model)
    name, original = list(expert_modules(model).items())[-1]
    return original, PackedExperts.from_packed(original, packed[name])


def routing(tokens: int, experts: int, top_k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(top_k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_experts_equal_the_original_with_decoded_weights(family, tokens):
    original, packed = pair(family)
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens))
    index, weights = routing(tokens, packed.num_experts)
    with torch.no_grad():
        out = packed(x, index, weights)
        expected = copy.deepcopy(original).double()(x.double(), index, weights.double())
    assert out.shape == (tokens, 40) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    assert tokens == 0 or expected.abs().max() > 0.01  # the comparison means something


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("compute", ["float", "stored", "auto"])
def test_half_precision_activations(family, dtype, tolerance, compute):
    original, packed = pair(family)
    packed.compute = compute
    if compute == "auto":
        tolerance += 0.015  # which is int8: two products of 1e-2 each, of sums over 40 columns
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    index, weights = routing(9, packed.num_experts)
    with torch.no_grad():
        expected = copy.deepcopy(original).double()(x.double(), index, weights.double())
        out = packed.to(dtype)(x, index, weights.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert packed.down_proj_qmoe.dtype == torch.uint8


@pytest.mark.parametrize("family", FUSED)
def test_every_family_runs_fused_and_the_unfused_way_agrees(family, monkeypatch):
    _, packed = pair(family)
    assert packed.gating is not None and packed.gating.clamped == (family == "gpt_oss")
    x = torch.randn(7, 40)
    index, weights = routing(7, packed.num_experts)
    with torch.no_grad():
        fused = packed(x, index, weights)
        packed.gating = None
        torch.testing.assert_close(packed(x, index, weights), fused, rtol=1e-5, atol=2e-6)


def test_gradients_go_through_the_unfused_way():
    original, packed = pair("qwen3_moe")
    x = torch.randn(3, 40)
    index, weights = routing(3, packed.num_experts)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    packed(inputs[0], index, weights).square().sum().backward()
    original(inputs[1], index, weights).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)


def test_a_gating_that_no_kernel_has_runs_through_its_own_code():
    original, usual = pair("qwen3_moe")

    class Unusual(type(original)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return torch.sin(gate) * up

    original.__class__ = Unusual
    packed = PackedExperts(original, usual.shapes)
    packed.load_state_dict(usual.state_dict())
    assert packed.gating is None
    x = torch.randn(4, 40)
    index, weights = routing(4, packed.num_experts)
    with torch.no_grad():
        gate, up = torch.einsum("th,tknh->tkn", x, original.gate_up_proj[index]).chunk(2, -1)
        each = torch.einsum("tki,tkhi->tkh", torch.sin(gate) * up, original.down_proj[index])
        expected = (each * weights.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(packed(x, index, weights), expected, rtol=1e-5, atol=1e-5)


def test_all_tokens_to_one_expert_and_experts_without_tokens():
    original, packed = pair("qwen3_moe")
    x = torch.randn(6, 40)
    index, weights = torch.tensor([[4, 0]]).expand(6, 2), torch.full((6, 2), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, index, weights), original(x, index, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("outside", [0, 1000, -1])
def test_choices_of_other_ranks_add_nothing(family, outside):
    """Expert parallelism marks experts of other ranks with an id >= num_experts; NaN weights there must not spread."""
    _, packed = pair(family)
    x = torch.randn(5, 40)
    index, weights = routing(5, packed.num_experts)
    alone = index[:, :1], weights[:, :1]
    marked = index.clone()
    marked[:, 1] = packed.num_experts + outside if outside >= 0 else outside
    poisoned = weights.clone()
    poisoned[:, 1] = float("nan")
    with torch.no_grad():
        # Not bitwise: torch's own activation functions round differently in a vector and in its tail.
        torch.testing.assert_close(packed(x, marked, poisoned), packed(x, *alone), rtol=1e-6, atol=1e-6)


def test_two_runs_are_bitwise_equal():
    _, packed = pair("mixtral")
    x = torch.randn(33, 40)
    index, weights = routing(33, packed.num_experts)
    with torch.no_grad():
        assert torch.equal(packed(x, index, weights), packed(x, index, weights))


def test_a_tokens_result_does_not_depend_on_its_batch_order():
    _, packed = pair("olmoe")
    x = torch.randn(8, 40)
    index, weights = routing(8, packed.num_experts)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    with torch.no_grad():
        shuffled, plain = packed(x[order], index[order], weights[order]), packed(x, index, weights)[order]
    torch.testing.assert_close(shuffled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FUSED)
def test_compiles_as_one_graph_without_recompiling_for_new_routing(family):
    _, packed = pair(family)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, seed in ((6, 0), (6, 1), (11, 2)):
            x = torch.randn(tokens, 40)
            index, weights = routing(tokens, packed.num_experts, seed=seed)
            torch.testing.assert_close(compiled(x, index, weights), packed(x, index, weights), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    _, packed = pair("qwen3_moe")
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True)
    x = torch.randn(6, 40)
    index, weights = routing(6, packed.num_experts)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, index, weights), packed(x, index, weights), rtol=1e-5, atol=1e-5)


def test_experts_without_a_gate():
    @use_experts_implementation(has_gate=False)
    class PlainExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 3
            self.up_proj = nn.Parameter(torch.randn(3, 24, 40))
            self.down_proj = nn.Parameter(torch.randn(3, 40, 24))
            self.act_fn = nn.ReLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    original = PlainExperts(None)
    records = {"up_proj": pack(original.up_proj), "down_proj": pack(original.down_proj)}
    packed = PackedExperts.from_packed(original, records)
    x = torch.randn(4, 40)
    index, weights = routing(4, 3)
    up, down = (unpack(records[key]).double() for key in ("up_proj", "down_proj"))
    expected = torch.zeros(4, 40, dtype=torch.float64)
    for token in range(4):
        for expert, weight in zip(index[token], weights[token], strict=True):
            expected[token] += weight.double() * (down[expert] @ (up[expert] @ x[token].double()).relu())
    torch.testing.assert_close(packed(x, index, weights).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FUSED)
def test_dequantize_has_the_layout_of_the_original(family):
    original, packed = pair(family)
    for key in (module_first(original), "down_proj"):
        assert torch.equal(packed.dequantize(key), getattr(original, key))


def test_gradients_reach_the_activations():
    original, packed = pair("qwen3_moe")
    index, weights = routing(5, packed.num_experts)
    grads = []
    for module in (original, packed):
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(5)).requires_grad_()
        module(x, index, weights).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(bias):
    layer = nn.Linear(45, 17, bias=bias)
    record = pack(layer.weight[None])
    packed = PackedLinear.from_packed(layer, record)
    x = torch.randn(2, 3, 45)
    expected = x.double() @ unpack(record)[0].double().T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.dequantize(), unpack(record)[0])
    half = packed.to(torch.bfloat16)
    assert half.weight_qmoe.dtype == torch.uint8 and half(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert set(packed.state_dict()) == ({"weight_qmoe", "bias"} if bias else {"weight_qmoe"})


def refused(code: str, call, *args) -> QmoeError:
    with pytest.raises(QmoeError) as caught:
        call(*args)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_refusals():
    original, packed = pair("qwen3_moe")
    shapes = dict(packed.shapes)
    refused("E_LAYOUT", PackedExperts, nn.Linear(4, 4), shapes)
    refused("E_LAYOUT", PackedExperts, original, {"down_proj": shapes["down_proj"]})
    refused("E_LAYOUT", PackedExperts, original, {**shapes, "up_proj": shapes["down_proj"]})
    refused("E_SHAPE", PackedExperts, original, {**shapes, "down_proj": shapes["gate_up_proj"]})
    linear = nn.Linear(6, 4)
    refused("E_LAYOUT", PackedLinear, original, {"weight": PackedShape(1, 4, 6, 100)})
    refused("E_LAYOUT", PackedLinear, linear, {"other": PackedShape(1, 4, 6, 100)})
    refused("E_SHAPE", PackedLinear, linear, {"weight": PackedShape(1, 6, 4, 100)})
    refused("E_SHAPE", PackedLinear, linear, {"weight": PackedShape(2, 4, 6, 100)})


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"shape": [1, 2, 3]},
        {"shape": [1, 2], "nbytes": 4},
        {"shape": [1, 2, 0], "nbytes": 4},
        {"shape": [1, 2, -3], "nbytes": 4},
        {"shape": [1, 2, True], "nbytes": 4},
        {"shape": [1, 2, 3.0], "nbytes": 4},
        {"shape": "abc", "nbytes": 4},
        {"shape": [1, 2, 3], "nbytes": 2**70},
    ],
)
def test_refusals_of_a_shape_table(entry):
    assert refused("E_SHAPE", PackedShape.parse, entry, "layer.x").tensor == "layer.x"


def test_the_packed_module_keeps_what_the_original_had():
    original, packed = pair("gpt_oss")
    assert packed.limit == original.limit and packed.alpha == original.alpha
    assert set(packed.state_dict()) == {
        "gate_up_proj_qmoe",
        "gate_up_proj_bias",
        "down_proj_qmoe",
        "down_proj_bias",
    }
    clone = copy.deepcopy(packed)
    x = torch.randn(3, 40)
    index, weights = routing(3, packed.num_experts)
    with torch.no_grad():
        assert torch.equal(clone(x, index, weights), packed(x, index, weights))
