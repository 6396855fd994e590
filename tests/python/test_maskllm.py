"""Learned masks: planted ones are found, priors count, trainings continue, recompute and divide up as they should."""

from __future__ import annotations

import copy
import doctest
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from packed_fixtures import tiny_model
from test_distributed import together
from torch import nn

from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import NM, MaskLearner, Masks, Pattern, maskllm


def regression(pattern: str = "2:4") -> tuple[nn.Linear, Masks, torch.Tensor]:
    """A layer whose weights are right where a planted mask keeps them, and of the same size but wrong elsewhere; the
    mask; and inputs."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 12, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 16, generator=generator).sign())
    planted = Pattern.parse(pattern).select(torch.rand(12, 16, generator=generator))
    return layer, Masks({"weight": planted}, Pattern.parse(pattern)), torch.randn(512, 16, generator=generator)


def error_against(masks: Masks, layer: nn.Linear):
    right = layer.weight.detach() * masks["weight"]

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x @ right.T).square().mean()

    return loss


def agreement(found: Masks, planted: Masks) -> float:
    return float((found["weight"] == planted["weight"]).float().mean())


def test_the_examples_of_docstrings_run():
    result = doctest.testmod(maskllm)
    assert result.failed == 0 and result.attempted > 5


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8"])
def test_a_planted_mask_is_found(pattern):
    layer, planted, x = regression(pattern)
    before = layer.weight.detach().clone()
    learner = MaskLearner(layer, pattern, names=["weight"], kappa=(10, 50))
    assert learner.logits["weight"].shape == (12, 16 // planted.patterns["weight"].m, math.comb(*_sizes(pattern)))
    assert agreement(learner.masks, planted) < 0.8
    loss = error_against(planted, layer)
    losses = learner.train(lambda step: x, 150, lr=2e-2, loss=loss)
    assert torch.equal(layer.weight, before)  # frozen
    found = learner.finish()
    found.check()
    assert agreement(found, planted) == 1.0 and losses[-1] < 0.05 * losses[0]
    assert torch.equal(layer.weight, before * planted["weight"]) and layer.weight.requires_grad


def _sizes(pattern: str) -> tuple[int, int]:
    n, m = map(int, pattern.split(":"))
    return m, n


def test_what_training_sees_is_a_sample_and_what_evaluation_sees_is_the_best():
    layer, _, x = regression()
    learner = MaskLearner(layer, names=["weight"])
    weight, names = layer.weight, list(layer.state_dict())
    learner.step(0, 10)
    with torch.no_grad():
        first, again = layer.train()(x), layer(x)
        soft = learner._sample("weight")
        learner.step(1, 10)
        other = layer(x)
        best = layer.eval()(x)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(first, x @ (weight * soft).T) and 0 < float(soft.min()) < float(soft.max()) < 1
    assert torch.allclose(soft.unflatten(1, (-1, 4)).sum(2), torch.full((12, 4), 2.0))  # n of m, shared out
    assert torch.allclose(best, x @ (weight * learner.masks["weight"]).T)
    assert layer.weight is weight and list(layer.state_dict()) == names
    with pytest.raises(RuntimeError):
        layer(x[:, :3])
    assert layer.weight is weight  # also behind an error


def test_schedules_go_from_the_first_value_to_the_last():
    learner = MaskLearner(regression()[0], names=["weight"], kappa=(100, 500), tau=(4, 0.05), reg=1e-5)
    seen = []
    for step in (0, 50, 99):
        learner.step(step, 100)
        seen.append((learner.kappa, learner.tau, learner.reg))
    assert seen[0] == (100, 4, 1e-5)
    assert seen[1] == pytest.approx((300, 2.025, 5e-6)) and seen[2] == pytest.approx((496, 0.0895, 1e-7))


def test_priors_move_logits_as_published():
    layer, planted, _ = regression()
    plain = MaskLearner(copy.deepcopy(layer), names=["weight"], seed=3).logits["weight"].detach()
    learner = MaskLearner(copy.deepcopy(layer), prior=planted, alpha=3.0, names=["weight"], seed=3)
    moved = learner.logits["weight"].tolist()
    candidates = NM(2, 4).candidates().float()
    groups = planted["weight"].unflatten(1, (-1, 4)).float()
    for row, group, c in itertools.product(range(12), range(4), range(6)):
        bump = float(plain.std()) * 3.0 * (float(groups[row, group] @ candidates[c]) - 1.0)
        assert moved[row][group][c] == pytest.approx(float(plain[row, group, c]) + bump, abs=1e-6)
    assert agreement(learner.masks, planted) > 0.9  # three widths of the noise
    strong = MaskLearner(copy.deepcopy(layer), prior=planted, alpha=30.0, names=["weight"])
    assert agreement(strong.masks, planted) == 1.0
    # A domain's mask from a general one: whatever masks were learned are a prior.
    again = MaskLearner(copy.deepcopy(layer), prior=strong.finish(), alpha=30.0, names=["weight"])
    assert agreement(again.masks, planted) == 1.0


def test_the_regulariser_is_the_energy_of_what_stays_and_raises_it():
    layer, _, _ = regression()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 17).expand(12, 16))
    learner = MaskLearner(layer, names=["weight"], kappa=(20, 20), reg=1e-3)
    learner.step(0, 10)
    mask = learner._sample("weight").detach()
    expected = -1e-3 * float((layer.weight * mask).square().sum())
    assert float(learner.regulariser().detach()) == pytest.approx(expected, rel=1e-5)
    largest = Pattern.parse("2:4").select(layer.weight)
    assert float((learner.masks["weight"] & largest).sum()) < 0.7 * float(largest.sum())
    learner.train(lambda step: torch.zeros(1, 16), 100, lr=2e-2, loss=lambda model, x: model(x).sum() * 0.0)
    assert float((learner.masks["weight"] & largest).sum()) > 0.95 * float(largest.sum())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_models_are_masked_along_their_inputs(family):
    model = tiny_model(family).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = MaskLearner(model, "2:4", reg=0.0)
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    learner.train(lambda step: ids, 3, lr=1e-2)
    assert all(float(logits.grad.abs().sum()) > 0 for logits in learner.parameters())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        expected = model.eval()(ids).logits
    masks = learner.finish()
    masks.check()
    assert bool(masks.transposed) == (family == "gpt_oss") and len(masks) == 4
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)  # what evaluation has seen
    reference = tiny_model(family)
    masks.apply(reference)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_gradient_checkpointing_recomputes_the_same_sample():
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("qwen3_moe").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        learner = MaskLearner(model)
        learner.step(3, 10)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([logits.grad for logits in learner.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8) and float(a.abs().max()) > 0


def test_bfloat16_models_train_float32_logits():
    model = tiny_model("qwen3_moe").to(torch.bfloat16).train()
    learner = MaskLearner(model)
    ids = torch.randint(3, 90, (4, 12))
    losses = learner.train(lambda step: ids, 2, dtype="bfloat16")
    assert all(math.isfinite(loss) for loss in losses)
    assert {logits.dtype for logits in learner.parameters()} == {torch.float32}
    learner.finish().check()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_training_continues_to_the_same_bits(tmp_path):
    def run(state, stop: int | None = None) -> tuple[MaskLearner, list[float]]:
        layer, planted, x = regression()
        learner = MaskLearner(layer, names=["weight"])

        def progress(done: int, loss: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        loss = error_against(planted, layer)
        return learner, learner.train(lambda step: x[step::20], 20, loss=loss, state=state, every=4, progress=progress)

    whole, losses = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state", stop=10)  # the state is that of step 8
    resumed, again = run(tmp_path / "state")
    assert again == losses and torch.equal(whole.logits["weight"], resumed.logits["weight"])
    layer, _, x = regression()
    with pytest.raises(QmoeError, match="E_CHANGED"):
        MaskLearner(layer, names=["weight"]).train(lambda step: x, 21, state=tmp_path / "state")


@pytest.mark.parametrize("joined", [False, True])
def test_processes_learn_one_mask_from_their_parts_of_every_batch(tmp_path, joined):
    def run(rank: int) -> tuple[torch.Tensor, float, bool]:
        if joined:  # else as torchrun leaves it
            dist.init_process_group("gloo")
        layer, planted, x = regression()
        learner = MaskLearner(layer, names=["weight"], kappa=(10, 50))
        loss, rows = error_against(planted, layer), []

        def noted(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
            rows.append(len(part))
            return loss(model, part)

        learner.train(lambda step: x[:511], 150, lr=2e-2, loss=noted)
        logits, mask = learner.logits["weight"].detach(), agreement(learner.finish(), planted)
        assert dist.is_initialized() == joined
        return logits, mask, set(rows) == {256 - rank}

    outcomes = together(2, tmp_path, run)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == 1.0 and all(outcome[2] for outcome in outcomes)


def test_what_makes_no_sense_is_refused():
    layer, _, x = regression()
    for code, settings in [
        ("E_VALUE", {"pattern": "unstructured"}),
        ("E_VALUE", {"tau": (4.0, 0.0)}),
        ("E_LIMIT", {"pattern": "8:16"}),
        ("E_SHAPE", {"pattern": "2:5"}),
        ("E_MISSING", {"names": ["absent"]}),
        ("E_MISSING", {"prior": Masks({})}),
        ("E_SHAPE", {"prior": Masks({"weight": torch.ones(2, 4, dtype=torch.bool)})}),
    ]:
        with pytest.raises(QmoeError, match=code):
            MaskLearner(copy.deepcopy(layer), **{"names": ["weight"], **settings})
    learner = MaskLearner(layer, names=["weight"])
    for wrong in (
        lambda: learner.step(10, 10),
        lambda: learner.train(lambda step: x, 2, dtype="float16"),
        lambda: learner.train(lambda step: x, 2, loss=lambda model, x: model(x).sum() * math.nan),
    ):
        with pytest.raises(QmoeError, match="E_VALUE"):
            wrong()
    with pytest.raises(QmoeError, match="E_MISSING"):
        learner.load_state_dict({})
