"""Sparse training: schedules, rules, masks that hold whatever the optimizer does, and states that continue."""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import torch
from packed_fixtures import tiny_model
from torch import nn

from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import ACDC, Constant, Cubic, Masks, OneShot, Pattern, Periodic, Sparsifier
from qmoe_core.sparsify.rules import RULES, drop_share
from qmoe_core.sparsify.selection import select_weights


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, each=lambda step: None):
    """Steps on data that depends on the step's number alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 16, generator=generator)
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each(step)


def zeros(sparsifier: Sparsifier) -> float:
    weights = [weight.parameter for weight in sparsifier.weights.values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("name", ["schedules", "training", "rules", "selection"])
def test_the_examples_of_docstrings_run(name):
    module = importlib.import_module(f"qmoe_core.sparsify.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0 and (result.attempted > 0) == (name in ("schedules", "training"))


def test_schedules():
    cubic = Cubic(10, 20, every=4)
    assert [step for step in range(40) if cubic.changes(step)] == [12, 16, 19]
    assert cubic.sparsity(9, 0.8) == 0 and cubic.sparsity(19, 0.8) == cubic.sparsity(100, 0.8) == 0.8
    assert cubic.sparsity(14, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert Cubic.of(400) == Cubic(100, 300) and Cubic(10, 20, 4).extended(5) == Cubic(50, 100, 4)
    assert ACDC(2, 2, 1, 7).extended(10) == ACDC(20, 20, 10, 70)
    assert Periodic(5, 10, None).extended(2) == Periodic(5, 20, None) and Constant().extended(3) == Constant()
    assert OneShot(3).extended(2) == OneShot(6)
    acdc = ACDC(warmup=3, sparse=2, dense=2, end=9)
    phases = [acdc.sparsity(step, 1.0) > 0 for step in range(-1, 12)]  # by steps done: 0, 1, 2, ...
    assert phases == [False] * 3 + [True, True, False, False, True, True] + [True] * 4
    assert [s for s in range(12) if acdc.changes(s)] == [2, 4, 6]
    for wrong in (lambda: Cubic(5, 5), lambda: Periodic(0), lambda: ACDC(5, 1, 1, 4), lambda: Cubic(0, 4).extended(0)):
        with pytest.raises(QmoeError, match="E_VALUE"):
            wrong()


@pytest.mark.parametrize("rule", ["magnitude", "saliency", "fisher", "random", "ste"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.75), ("2:4", None), ("block:4x4", 0.5)])
def test_gradual_pruning_follows_the_cubic_schedule_and_masks_hold(rule, pattern, sparsity):
    model, schedule, seen = small(), Cubic(4, 14, every=3), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    sparsifier = Sparsifier(model, pattern, sparsity, schedule=schedule, rule=rule).attach(optimizer)
    target = sparsity or 0.5
    before = sparsifier.masks

    def check(step: int) -> None:
        nonlocal before
        masks = sparsifier.masks
        for name, weight in sparsifier.weights.items():
            assert not weight.parameter[~masks[name]].any()
            if rule != "ste":
                assert not (masks[name] & ~before[name]).any(), "gone for good"
        before = masks
        seen.append(masks.sparsity())

    train(model, optimizer, 18, each=check)
    assert seen[:4] == [0.0] * 4 and seen[-1] == pytest.approx(target)
    for step in (6, 9, 12):
        expected = schedule.sparsity(step, target)
        assert seen[step] == pytest.approx(expected, abs=0.05) and seen[step] == seen[step + 1]
    masks = sparsifier.finish()
    masks.check()
    assert zeros(sparsifier) == pytest.approx(target, abs=0.01)


def test_nm_is_approached_through_its_winners():
    weight = torch.arange(1.0, 17).view(2, 8)
    linear = nn.Linear(8, 2, bias=False)
    linear.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(linear.parameters(), 0.0)
    sparsifier = Sparsifier(linear, "2:4", schedule=Cubic(0, 100, every=1)).attach(optimizer)
    linear(torch.ones(1, 8)).sum().backward()
    for _ in range(20):
        optimizer.step()
    masks = sparsifier.masks
    winners = Pattern.parse("2:4").select(weight)
    assert 0 < masks.sparsity() < 0.5 and masks["weight"][winners].all()
    gone = weight[~masks["weight"]]
    assert gone.max() < weight[masks["weight"] & ~winners].min()  # the smallest of the others
    assert str(masks.patterns["weight"]) == "unstructured"


def test_scores_see_what_they_are_named_for():
    """Weights of one size: gradients decide; with all gradients alike, size does."""
    linear = nn.Linear(4, 1, bias=False)
    x = torch.tensor([[1.0, 3.0, 0.1, 2.0]])
    for rule, kept in (("saliency", [1, 3]), ("fisher", [1, 3]), ("magnitude", [2, 3])):
        linear.weight.data.copy_(torch.tensor([[1.0, 1.0, 1.1, 1.2]]))
        for optimizer in (torch.optim.Adam([linear.weight], 0.0), torch.optim.SGD([linear.weight], 0.0)):
            sparsifier = Sparsifier(linear, sparsity=0.5, schedule=OneShot(2), rule=rule).attach(optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                linear(x).sum().backward()
                optimizer.step()
            found = sparsifier.finish()["weight"][0].nonzero().flatten().tolist()
            assert found == kept, rule
            linear.weight.data.copy_(torch.tensor([[1.0, 1.0, 1.1, 1.2]]))


def test_acdc_lets_weights_come_back():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = Sparsifier(model, sparsity=0.8, schedule=ACDC(2, 4, 4, 14)).attach(optimizer)
    seen = []
    train(model, optimizer, 20, each=lambda step: seen.append((sparsifier.masks.sparsity(), zeros(sparsifier))))
    by_masks = [round(mask, 2) for mask, _ in seen]
    assert by_masks == [0, 0.8, 0.8, 0.8, 0.8, 0, 0, 0, 0, 0.8, 0.8, 0.8, 0.8, 0.8] + [0.8] * 6
    assert seen[4][1] == pytest.approx(0.8, abs=0.01) and seen[8][1] < 0.05  # trained again from zero


def test_memory_of_weights_that_go_is_cleared():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sparsifier = Sparsifier(model, sparsity=0.5, schedule=OneShot(3)).attach(optimizer)
    train(model, optimizer, 4)
    for name, weight in sparsifier.weights.items():
        gone = ~sparsifier.masks[name]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[weight.parameter][key][gone].any()
            assert optimizer.state[weight.parameter][key][~gone].all()
    train(model, optimizer, 3, first=4)  # their gradients are cleared, so nothing gathers
    for name, weight in sparsifier.weights.items():
        assert not optimizer.state[weight.parameter]["exp_avg"][~sparsifier.masks[name]].any()


@pytest.mark.parametrize("rule", ["rigl", "set"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_exchange_keeps_the_number_of_weights(rule, distribution):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = Sparsifier(model, "unstructured", 0.75, distribution, Periodic(3, end=12), rule).attach(optimizer)
    first = sparsifier.masks
    assert first.sparsity() == pytest.approx(0.75, abs=0.01)
    counts = {name: int(mask.sum()) for name, mask in first.items()}
    if distribution == "erk":
        assert len({counts[name] / first[name].numel() for name in counts}) == 2
    changed, before = [], first

    def check(step: int) -> None:
        nonlocal before
        masks = sparsifier.masks
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
        changed.append(sum(int((masks[name] & ~before[name]).sum()) for name in masks))
        before = masks

    train(model, optimizer, 16, each=check)
    assert [step for step, count in enumerate(changed) if count] == [0, 3, 6, 9]  # at 12 the share is zero
    assert changed[0] > changed[9]


def test_rigl_drops_the_smallest_and_grows_where_gradients_are_largest():
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 0.1, 5.0, 6.0, 7.0, 8.0]]))
    mask = torch.tensor([[True, True, True, True, False, False, False, False]])
    optimizer = torch.optim.Adam(linear.parameters(), 0.0)
    sparsifier = Sparsifier(
        linear, sparsity=0.5, schedule=Periodic(1), rule="rigl", masks=Masks({"weight": mask}), drop=0.25
    ).attach(optimizer)
    assert linear.weight[0, 4:].tolist() == [0.0] * 4
    linear(torch.tensor([[9.0, 1.0, 1.0, 1.0, 2.0, 5.0, 3.0, 4.0]])).sum().backward()
    optimizer.step()
    assert sparsifier.masks["weight"][0].tolist() == [True, True, True, False, False, True, False, False]
    assert linear.weight[0].tolist() == [4.0, 3.0, 2.0] + [0.0] * 5  # what grows begins at zero
    assert optimizer.state[linear.weight]["exp_avg"][0, 5] == 0
    assert drop_share(0.3, 5, 10) == pytest.approx(0.15) and drop_share(0.3, 10, 10) == pytest.approx(0.0)


def test_static_masks_stay_and_straight_through_ones_do_not():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    static = Sparsifier(model, sparsity=0.5, rule="static", seed=1).attach(optimizer)
    first = static.masks
    train(model, optimizer, 5)
    assert all(torch.equal(mask, first[name]) for name, mask in static.masks.items())
    other = Sparsifier(small(), sparsity=0.5, rule="static", seed=2).masks
    assert any(not torch.equal(mask, first[name]) for name, mask in other.items())

    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data.copy_(torch.tensor([[1.0, 0.9]]))
    optimizer = torch.optim.SGD(linear.parameters(), 1.0)
    ste = Sparsifier(linear, sparsity=0.5, schedule=Periodic(1), rule="ste").attach(optimizer)
    assert linear.weight[0].tolist() == [1.0, 0.0]
    (linear(torch.tensor([[0.0, -0.5]])).sum()).backward()  # reaches the weight that is zero in the forward pass
    optimizer.step()
    assert linear.weight[0].tolist() == pytest.approx([0.0, 1.4]) and ste.masks["weight"].tolist() == [[False, True]]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_training_continues_from_the_optimizers_state_as_if_never_stopped(rule):
    schedule = Periodic(2, end=20) if RULES[rule].exchanges else Cubic(0, 12, every=2)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, optimizer, Sparsifier(model, sparsity=0.7, schedule=schedule, rule=rule).attach(optimizer)

    model, optimizer, whole = begin()
    train(model, optimizer, 16)
    half, optimizer_of_half, sparsifier = begin()
    train(half, optimizer_of_half, 7)
    saved = copy.deepcopy((half.state_dict(), optimizer_of_half.state_dict()))
    train(half, optimizer_of_half, 5, first=50)  # goes on to something else
    resumed, again, sparsifier = begin()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert sparsifier.steps == 7
    train(resumed, again, 9, first=7)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in whole.masks.items())


def test_states_of_something_else_are_refused():
    state = Sparsifier(small(), sparsity=0.5).state_dict()
    for code, change, other in [
        ("E_CHANGED", {"rule": "rigl"}, small()),
        ("E_CHANGED", {"pattern": "2:4"}, small()),
        ("E_MISSING", {"masks": {}}, small()),
        ("E_SHAPE", {}, nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))),
    ]:
        with pytest.raises(QmoeError, match=code):
            Sparsifier(other, sparsity=0.5).load_state_dict({**state, **change})
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plain = optimizer.state_dict()
    Sparsifier(model, sparsity=0.5).attach(optimizer)
    with pytest.raises(QmoeError, match="without the masks"):
        optimizer.load_state_dict(plain)


def test_settings_that_make_no_sense_are_refused():
    for code, settings in [
        ("E_UNKNOWN", {"rule": "best", "sparsity": 0.5}),
        ("E_VALUE", {}),
        ("E_VALUE", {"sparsity": 1.5}),
        ("E_VALUE", {"pattern": "2:4", "sparsity": 0.7}),
        ("E_VALUE", {"pattern": "2:4", "distribution": "erk"}),
        ("E_VALUE", {"pattern": "2:4", "rule": "rigl"}),
        ("E_VALUE", {"sparsity": 0.5, "rule": "set", "distribution": "global"}),
        ("E_VALUE", {"sparsity": 0.5, "distribution": "even"}),
        ("E_VALUE", {"sparsity": 0.5, "roles": ("router",)}),
        ("E_MISSING", {"sparsity": 0.5, "names": ("absent*",)}),
        ("E_MISSING", {"sparsity": 0.5, "masks": Masks({})}),
        ("E_SHAPE", {"pattern": "3:5"}),
    ]:
        with pytest.raises(QmoeError, match=code):
            Sparsifier(small(), **settings)
    model = small()
    sparsifier = Sparsifier(model, sparsity=0.5)
    with pytest.raises(QmoeError, match="does not train"):
        sparsifier.attach(torch.optim.SGD(model[0].parameters(), 0.1))


def test_a_global_distribution_lets_layers_compete():
    model = small()
    model[0].weight.data *= 10
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sparsifier = Sparsifier(model, sparsity=0.5, distribution="global", schedule=Cubic(0, 4, 1)).attach(optimizer)
    train(model, optimizer, 4)
    by_name = {entry.name: entry.sparsity for entry in sparsifier.report()}
    assert by_name["2.weight"] > 0.9 > 0.5 > by_name["0.weight"]
    assert sparsifier.masks.sparsity() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_experts_of_models_are_made_sparse_along_their_inputs(family):
    model = tiny_model(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sparsifier = Sparsifier(model, "2:4", schedule=OneShot(1)).attach(optimizer)
    assert all(".experts." in name for name in sparsifier.weights)
    dense = {n: p.detach().clone() for n, p in model.named_parameters() if n not in sparsifier.weights}
    ids = torch.randint(3, 90, (2, 12))
    inputs = {"input_ids": ids, "labels": ids}
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    masks = sparsifier.finish()
    masks.check()
    assert bool(masks.transposed) == (family == "gpt_oss")
    for weight in sparsifier.weights.values():
        groups = weight.matrices(weight.parameter).unflatten(-1, (-1, 4))
        assert int((groups != 0).sum(-1).max()) == 2
    assert all(bool(p.all()) or not bool(dense[n].all()) for n, p in model.named_parameters() if n in dense)


def test_which_weights_are_selected():
    model = tiny_model("deepseek_v3")
    experts = select_weights(model)
    assert experts and all(".experts." in name and weight.shape[0] == 8 for name, weight in experts.items())
    shared = select_weights(model, ("shared_expert", "attention"))
    assert any("shared_experts" in name for name in shared) and any("self_attn" in name for name in shared)
    assert not set(shared) & set(experts)
    assert list(select_weights(model, names=["*.q_a_proj.weight"])) == [
        f"model.layers.{layer}.self_attn.q_a_proj.weight" for layer in range(2)
    ]
    assert list(select_weights(small())) == ["0.weight", "2.weight"]
    assert math.prod(select_weights(small())["0.weight"].shape) == 16 * 24
