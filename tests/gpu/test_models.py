"""Whole packed models on a GPU: what they compute, where their weights are, CUDA graphs, generation."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest

from qmoe_core import QmoeError, Recipe, compress

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from qmoe_core.generation import load_model  # noqa: E402
from qmoe_core.runtime import cuda  # noqa: E402
from qmoe_core.runtime.experts import PackedExperts  # noqa: E402

SOURCE = Path(__file__).parents[2] / "examples" / "novels-moe"
RECIPES = {
    "int4": Recipe.uniform("int4"),
    "int2": Recipe.uniform("int2", group=64),
    "ternary": Recipe.uniform("ternary"),
}


@pytest.fixture(scope="module", params=list(RECIPES))
def compressed(request: Any, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("models") / request.param
    compress(SOURCE, out, RECIPES[request.param])
    return out


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 1000, (batch, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 5, 40, 300])
def test_logits_are_the_cpus(compressed: Path, count: int) -> None:
    ids = tokens(count)
    with torch.no_grad():
        expected = load_model(compressed, torch.float32, compute="float")(ids).logits
        exact = load_model(compressed, torch.float32, device="cuda")(ids.cuda()).logits.cpu()
        found = load_model(compressed, torch.bfloat16, device="cuda")(ids.cuda()).logits.float().cpu()
    assert (exact - expected).abs().max() < 1e-3
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std(), agree


def test_weights_are_on_the_device_once(compressed: Path) -> None:
    with torch.no_grad():  # libraries keep what they allocate for their first product
        load_model(compressed, torch.bfloat16, device="cuda")(tokens(4).cuda())
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load_model(compressed, torch.bfloat16, device="cuda")
    taken = torch.cuda.memory_allocated() - before
    plain = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_cuda)
    plain += sum(b.numel() * b.element_size() for b in model.buffers() if b.is_cuda)
    packed = [b for name, b in model.named_buffers() if name.endswith("_qmoe")]
    assert packed and all(b.device.type == "cpu" for b in packed)
    records = sum(b.numel() for b in packed)
    # Tiles are padded; tables of ternary matrices are 16 KiB each.
    assert taken <= plain + 1.5 * records + 16384 * 64 * 40, (taken, plain, records)
    ids = tokens(4)
    with torch.no_grad():
        on_gpu = model(ids.cuda()).logits.float().cpu()
        model.to("cpu")
        assert torch.cuda.memory_allocated() - before < taken // 4
        assert (model(ids).logits.float() - on_gpu).square().mean().sqrt() < 0.05 * on_gpu.std()
        again = copy.deepcopy(model).to("cuda")(ids.cuda()).logits.float().cpu()
    assert torch.equal(again, on_gpu)


def test_experts_at_once_and_in_turn_agree(compressed: Path, monkeypatch: Any) -> None:
    model = load_model(compressed, torch.bfloat16, device="cuda")
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    generator = torch.Generator().manual_seed(0)
    for count in (30, 700):
        x = torch.randn(count, experts.shapes["down_proj"].rows, generator=generator).bfloat16().cuda()
        ids = torch.randint(-1, experts.num_experts + 1, (count, 2), generator=generator).cuda()
        weights = torch.rand(count, 2, generator=generator).bfloat16().cuda()
        with torch.no_grad():
            at_once = experts(x, ids, weights)
            assert torch.equal(at_once, experts(x, ids, weights))
            with monkeypatch.context() as patch:
                patch.setattr(cuda, "MOST_CHOICES", 0)
                in_turn = experts(x, ids, weights)
        assert (at_once.float() - in_turn.float()).square().mean().sqrt() < 0.01 * in_turn.float().std()


def test_generation_with_a_static_cache_in_a_graph(tmp_path: Path) -> None:
    compress(SOURCE, tmp_path / "m", RECIPES["int4"])
    model = load_model(tmp_path / "m", torch.bfloat16, device="cuda")
    prompt = tokens(12).cuda()
    for options in ({}, {"cache_implementation": "static"}):  # the latter is compiled
        made = model.generate(prompt, max_new_tokens=16, do_sample=False, **options)
        with torch.no_grad():
            logits = model(made[:, :-1]).logits[:, 11:].float()
        chosen = logits.gather(-1, made[:, 12:, None])[..., 0]
        # Of the best ones, up to what bfloat16 may change.
        assert (chosen >= logits.amax(-1) - 0.1 * logits.std()).all()
    # One step of decoding, captured: nothing waits for the host, and nothing is allocated outside of the graph's pool.
    ids = tokens(1).cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(ids, use_cache=False).logits
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_device_map(compressed: Path) -> None:
    pytest.importorskip("accelerate")
    for place in ("cuda", "auto", {"": 0}):
        model = transformers.AutoModelForCausalLM.from_pretrained(compressed, device_map=place, dtype=torch.bfloat16)
        with torch.no_grad():
            assert model(tokens(3).cuda()).logits.is_cuda


def test_gradients_flow(compressed: Path) -> None:
    model = load_model(compressed, torch.float32, device="cuda")
    embedded = model.get_input_embeddings()(tokens(6).cuda()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad is not None and embedded.grad.isfinite().all() and embedded.grad.abs().max() > 0


def test_formats_without_tiles_decode(tmp_path: Path) -> None:
    compress(SOURCE, tmp_path / "m", Recipe.uniform("int4", group=16))
    model = load_model(tmp_path / "m", torch.bfloat16, device="cuda")
    with torch.no_grad():
        found = model(tokens(9).cuda()).logits.float().cpu()
        expected = load_model(tmp_path / "m", torch.float32, compute="float")(tokens(9)).logits
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_refusals(compressed: Path) -> None:
    with pytest.raises(QmoeError, match="E_NO_KERNEL"):
        load_model(compressed, torch.bfloat16, device="cuda", compute="int8")(tokens(2).cuda())
