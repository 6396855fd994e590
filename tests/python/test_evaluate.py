"""Evaluation against slow, plain recomputations; its refusals; and the router observer on every family."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from packed_fixtures import FAMILIES, inputs_for, tiny_model
from torch.nn import functional as F

import qmoe_core
from qmoe_core.errors import QmoeError
from qmoe_core.evaluation import ClusterMean, encode_text, evaluate, evaluate_all
from qmoe_core.runtime.routing import agreement, record_routing, selection_mask

TOKENS = np.random.default_rng(0).integers(3, 96, 203)


@pytest.fixture(scope="module")
def models():
    """A model and a slightly disturbed copy."""
    reference, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model, reference


def plain(model, reference, window: int, count: int) -> dict[str, list[list[float]]]:
    """Per window: losses, divergences, top-1 matches and routing overlaps, one token at a time in float64."""
    result: dict[str, list[list[float]]] = {"nll": [], "kl": [], "top1": [], "router": []}
    for index in range(count):
        ids = torch.from_numpy(TOKENS[index * window : (index + 1) * window])[None]
        chosen = []
        logits = []
        for m in (reference, model):
            picked: list[torch.Tensor] = []
            hooks = [
                layer.mlp.gate.register_forward_hook(lambda _m, _i, out, picked=picked: picked.append(out[2]))
                for layer in m.model.layers
            ]
            with torch.no_grad():
                logits.append(m(input_ids=ids).logits[0, :-1].double())
            for hook in hooks:
                hook.remove()
            chosen.append(picked)
        p, q = (F.log_softmax(x, -1) for x in logits)
        result["nll"].append([-q[t, ids[0, t + 1]].item() for t in range(window - 1)])
        result["kl"].append([(p[t].exp() * (p[t] - q[t])).sum().item() for t in range(window - 1)])
        result["top1"].append([float(p[t].argmax() == q[t].argmax()) for t in range(window - 1)])
        result["router"].append(
            [
                len(set(a[t].tolist()) & set(b[t].tolist())) / a.shape[1]
                for a, b in zip(*chosen, strict=True)
                for t in range(window)
            ]
        )
    return result


def mean_and_se(rows: list[list[float]]) -> tuple[float, float]:
    means = np.array([np.mean(row) for row in rows])  # equal windows: the clustered error is that of the window means
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_a_plain_recomputation(models, batch_size):
    model, reference = models
    result = evaluate(model, TOKENS, reference=reference, window=20, batch_size=batch_size)
    expected = {key: mean_and_se(rows) for key, rows in plain(model, reference, 20, 10).items()}
    assert result.windows == 10 and result.window == 20 and result.tokens == 190  # 203 tokens: the last 3 are dropped
    for mean, se, key in (
        (result.nll, result.nll_se, "nll"),
        (result.kl, result.kl_se, "kl"),
        (result.top1_agreement, result.top1_se, "top1"),
        (result.router_agreement, result.router_se, "router"),
    ):
        assert mean == pytest.approx(expected[key][0], rel=1e-4), key
        assert se == pytest.approx(expected[key][1], rel=1e-3), key
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.perplexity_se == pytest.approx(result.perplexity * result.nll_se)
    assert result.kl > 0 and 0 < result.top1_agreement < 1 and 0 < result.router_agreement < 1


def test_a_model_against_itself(models):
    result = evaluate(models[0], TOKENS, reference=models[0], window=20)
    assert result.kl == 0.0 and result.kl_se == 0.0
    assert result.top1_agreement == 1.0 and result.router_agreement == 1.0


def test_without_reference_there_is_no_comparison(models):
    result = evaluate(models[0], TOKENS, window=20)
    assert (result.kl, result.top1_agreement, result.router_agreement) == (None, None, None)
    assert (result.kl_se, result.top1_se, result.router_se) == (None, None, None)
    assert json.loads(json.dumps(result.to_dict()))["windows"] == 10
    one = evaluate(models[0], TOKENS, window=200)
    assert one.windows == 1 and one.nll_se is None and one.perplexity_se is None


def test_max_tokens_and_progress(models):
    events = []
    result = evaluate(models[0], TOKENS, window=20, max_tokens=139, batch_size=4, progress=events.append)
    assert result.windows == 6
    assert [(e.stage, e.done, e.total) for e in events] == [("evaluate", 4, 6), ("evaluate", 6, 6)]


def test_restores_training_mode_and_removes_hooks(models):
    model = tiny_model("qwen3_moe").train()
    evaluate(model, TOKENS, window=20, max_tokens=40)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    reference, model = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    result = evaluate(model, TOKENS, reference=reference, window=20, max_tokens=80)
    assert result.tokens == 4 * (10 if model.config.is_encoder_decoder else 19)
    assert result.kl > 0 and 0 < result.router_agreement < 1
    assert math.isfinite(result.perplexity)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_of_every_family_are_seen(family):
    model = tiny_model(family)
    with record_routing(model) as routes, torch.no_grad():
        model(**inputs_for(model, length=12, batch=2))
    sparse = {"deepseek_v3": 1}.get(family, 2)
    choices = 1 if family == "switch_transformers" else 2
    assert len(routes) == sparse
    for masks in routes.values():
        assert len(masks) == 1 and masks[0].dtype == torch.bool and masks[0].shape[0] == 24
        assert (masks[0].sum(-1) == choices).all()


def test_agreement_of_sets():
    a = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    b = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert agreement(a, b).tolist() == [0.0, 0.5, 1.0, 0.0, 0.75]


def test_selection_mask_of_ids_and_masks():
    class Router(torch.nn.Module):
        num_experts, top_k = 4, 2

    router = Router()
    logits = torch.randn(2, 4)
    ids = selection_mask(router, (logits, logits[:, :2], torch.tensor([[0, 3], [4, 1]])))
    assert ids.tolist() == [[True, False, False, True], [False, True, False, False]]
    mask = selection_mask(router, (torch.tensor([[0, 1, 0, 0]]), logits))
    assert mask.tolist() == [[False, True, False, False]]
    assert selection_mask(router, logits) is None
    assert selection_mask(router, (logits, logits)) is None


def test_cluster_mean_of_unequal_windows():
    total = ClusterMean()
    assert total.mean() is None and total.se() is None
    total.add(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    total.add(torch.tensor([[6.0]]))
    assert total.mean() == pytest.approx(14 / 5)
    squares = (4 - 2 * 2.8) ** 2 * 2 + (6 - 2.8) ** 2
    assert total.se() == pytest.approx(math.sqrt(squares * 3 / 2) / 5)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (TOKENS, {"window": 1}),
        (TOKENS[:19], {"window": 20}),
        (TOKENS, {"window": 20, "max_tokens": 0}),
        (TOKENS, {"window": 20, "batch_size": 0}),
        (TOKENS.astype(np.float32), {"window": 20}),
        (TOKENS[None], {"window": 20}),
        (TOKENS + 96, {"window": 20}),
        (TOKENS - 4, {"window": 200}),
    ],
)
def test_refuses_bad_arguments(models, tokens, options):
    with pytest.raises(QmoeError) as caught:
        evaluate(models[0], tokens, **options)
    assert caught.value.code == "E_VALUE"


def test_refuses_models_that_cannot_be_compared(models):
    for changes in ({"vocab_size": 97}, {"num_experts": 6}):
        with pytest.raises(QmoeError) as caught:
            evaluate(models[0], TOKENS, reference=tiny_model("qwen3_moe", **changes), window=20)
        assert caught.value.code == "E_SHAPE"


def test_refuses_logits_that_are_not_finite():
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(QmoeError) as caught:
        evaluate(model, TOKENS, window=20)
    assert caught.value.code == "E_VALUE"


def test_paths_are_loaded_in_float32(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    by_path = evaluate(tmp_path, TOKENS, window=20)
    assert by_path.nll == pytest.approx(evaluate(models[0], TOKENS, window=20).nll, rel=1e-6)


def test_several_models_share_one_reference(models):
    model, reference = models
    events = []
    together = evaluate_all(
        {"a": model, "b": reference}, TOKENS, reference=reference, window=20, progress=events.append
    )
    for name, single in (("a", model), ("b", reference)):
        alone = evaluate(single, TOKENS, reference=reference, window=20)
        assert together[name].to_dict() | {"seconds": 0} == alone.to_dict() | {"seconds": 0}
    assert (events[-1].done, events[-1].total) == (20, 20)
    with pytest.raises(QmoeError) as caught:
        evaluate_all({}, TOKENS)
    assert caught.value.code == "E_VALUE"


def test_public_name():
    assert qmoe_core.evaluate is evaluate


def test_encode_text_adds_nothing():
    def tokenizer(text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    ids = encode_text(tokenizer, "abc")
    assert ids.dtype == np.int64 and ids.tolist() == [97, 98, 99]
