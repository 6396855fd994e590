"""The solver against brute force, its promises on random problems, and what surrounds it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_core.allocation import Candidate, Item, frontier, parse_bytes, plan_recipe, solve
from qmoe_core.allocation.problem import Tables
from qmoe_core.allocation.solver import hull_steps, solve_tables
from qmoe_core.errors import QmoeError
from qmoe_core.recipe import Recipe

whole_losses = st.integers(-3, 30).map(float)
real_losses = st.floats(-1, 10, allow_nan=False, allow_subnormal=False)


def problems(losses: st.SearchStrategy[float], items: int = 6) -> st.SearchStrategy[list[Item]]:
    candidate = st.builds(Candidate, st.integers(0, 40), losses)
    return st.lists(
        st.lists(candidate, min_size=1, max_size=5).map(lambda c: Item("item", 1, tuple(c))), min_size=1, max_size=items
    )


def range_of(items: list[Item]) -> tuple[int, int]:
    sizes = [[candidate.nbytes for candidate in item.candidates] for item in items]
    return sum(map(min, sizes)), sum(map(max, sizes))


def best_loss(items: list[Item], budget: int) -> float:
    choices = itertools.product(*(item.candidates for item in items))
    return min(sum(c.loss for c in choice) for choice in choices if sum(c.nbytes for c in choice) <= budget)


@settings(max_examples=300, deadline=None)
@given(problems(st.one_of(whole_losses, real_losses)), st.floats(0, 1.1))
def test_small_problems_are_solved_exactly(items: list[Item], share: float) -> None:
    low, high = range_of(items)
    budget = int(low + share * (high - low))
    result, best = solve(items, budget), best_loss(items, budget)
    chosen = [item.candidates[number] for item, number in zip(items, result.choice, strict=True)]
    assert result.nbytes == sum(c.nbytes for c in chosen) <= budget
    assert result.loss == pytest.approx(sum(c.loss for c in chosen), abs=1e-9)
    assert result.loss == pytest.approx(best, abs=1e-9)
    assert result.bound <= best + 1e-9
    assert result.optimal


def test_losses_that_underflow_never_break_the_budget() -> None:
    tiny = float(np.finfo(np.float64).tiny)
    item = Item("item", 1, (Candidate(0, 0.0, {}), Candidate(3, -tiny, {})))
    for budget, nbytes in ((0, 0), (2, 0), (3, 3)):
        assert solve([item], budget).nbytes == nbytes


@settings(max_examples=100, deadline=None)
@given(problems(real_losses, items=40), st.floats(0, 1), st.floats(0, 1))
def test_budget_certificate_and_monotony(items: list[Item], first: float, second: float) -> None:
    low, high = range_of(items)
    results = [solve(items, int(low + share * (high - low))) for share in sorted((first, second))]
    for result in results:
        assert result.nbytes <= result.budget
        # Weak duality: anyone can recompute the bound from the price alone.
        terms = [min(c.loss + result.price * c.nbytes for c in item.candidates) for item in items]
        assert result.price >= 0
        assert sum(terms) - result.price * result.budget == pytest.approx(result.bound, abs=1e-7)
        assert result.bound - 1e-7 <= result.loss <= result.bound + result.gap + 1e-7 or result.optimal
    if results[0].optimal and results[1].optimal:
        assert results[1].loss <= results[0].loss + 1e-9


def test_the_same_problem_gives_the_same_choice() -> None:
    nbytes, loss = random_tables(2000, 10, seed=5)
    budget = int(nbytes.mean(axis=1).sum())
    assert solve_tables(Tables(nbytes, loss), budget) == solve_tables(Tables(nbytes, loss), budget)


def random_tables(items: int, candidates: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall about fourfold per bit, as those of formats do."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(1, 8, candidates) * rng.uniform(0.95, 1.05, (items, candidates))
    weights = rng.choice([1 << 18, 1 << 20], items)
    loss = 4.0**-bits * rng.lognormal(0, 1, (items, 1)) * rng.uniform(0.9, 1.1, (items, candidates))
    return (weights[:, None] * bits / 8).astype(np.int64), loss


def test_a_hundred_thousand_items_take_seconds_and_the_gap_is_tiny() -> None:
    nbytes, loss = random_tables(100_000, 10, seed=1)
    started = time.process_time()
    result = solve_tables(Tables(nbytes, loss), int(0.4 * nbytes.max(axis=1).sum()))
    assert time.process_time() - started < 20  # about 1 second; shared machines are slow
    assert result.gap < 1e-5 * result.loss


def test_a_thousand_items_are_close_to_the_bound() -> None:
    nbytes, loss = random_tables(1000, 10, seed=2)
    for share in (0.15, 0.3, 0.6):
        result = solve_tables(Tables(nbytes, loss), int(share * nbytes.max(axis=1).sum()))
        assert result.gap < 1e-4 * result.loss


def test_infeasible_budget_names_the_smallest_size() -> None:
    items = [Item("a", 1, (Candidate(10, 1.0), Candidate(20, 0.5))), Item("b", 1, (Candidate(7, 1.0),))]
    with pytest.raises(QmoeError, match="17") as error:
        solve(items, 16)
    assert error.value.code == "E_VALUE"
    assert solve(items, 17).choice == (0, 0)


@pytest.mark.parametrize("candidates", [(), (Candidate(1, float("nan")),), (Candidate(-1, 0.0),)])
def test_candidates_that_are_none_are_refused(candidates: tuple[Candidate, ...]) -> None:
    with pytest.raises(QmoeError) as error:
        solve([Item("model.x", 1, candidates)], 10)
    assert (error.value.code, error.value.tensor) == ("E_VALUE", "model.x")


def test_no_items_cost_nothing() -> None:
    assert solve([], 0).loss == 0.0


@settings(max_examples=100, deadline=None)
@given(problems(real_losses, items=5))
def test_frontier_is_convex_and_optimal(items: list[Item]) -> None:
    points = frontier(items)
    low, _ = range_of(items)
    assert points[0].nbytes == low
    assert points[-1].loss == pytest.approx(sum(min(c.loss for c in item.candidates) for item in items), abs=1e-9)
    for point in points:
        assert point.loss == pytest.approx(best_loss(items, point.nbytes), abs=1e-9)
    slopes = [(b.loss - a.loss) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(points)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))


def test_frontier_of_many_items_is_thinned() -> None:
    nbytes, loss = random_tables(500, 10, seed=3)
    items = [
        Item(str(row), 1, tuple(Candidate(int(b), float(e)) for b, e in zip(*pair, strict=True)))
        for row, pair in enumerate(zip(nbytes, loss, strict=True))
    ]
    points = frontier(items, 50)
    assert len(points) == 50
    assert len(hull_steps(Tables(nbytes, loss)).item) > 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 << 30), ("24GB", 24 * 10**9), ("800MB", 800 * 10**6), ("800 mb", 800 * 10**6), ("1.5KiB", 1536),
        ("12345", 12345), (7, 7), ("0.3GB", 300_000_000), ("1 TiB", 1 << 40), ("10b", 10),
    ],
)  # fmt: skip
def test_sizes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "24 GiBs", "1,5GB", "0", 0, -5, True, "0.1"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(QmoeError) as error:
        parse_bytes(text)
    assert error.value.code == "E_VALUE"


def test_recipe_names_tensors_that_differ_and_survives_toml(tmp_path) -> None:
    small, large = {"format": "ternary", "options": {"threshold": 1.0}}, {"format": "int4", "group": 32}
    names = [f"model.layers.{layer}.mlp.experts.{part}" for layer in range(3) for part in ("gate_up_proj", "down_proj")]
    items = [Item(name, 8, (Candidate(1, 8.0, small), Candidate(4, 0.0, large))) for name in names]
    items.append(
        Item("model.layers.0.self_attn.q_proj", 8, (Candidate(1, 90.0, small), Candidate(4, 0.0, large)), "attention")
    )
    recipe = plan_recipe(items, solve(items, 7 + 3 * 3))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe
    formats = [recipe.choose(item.name, item.role)[1].format.name for item in items]
    assert sorted(formats) == ["int4-g32"] * 3 + ["ternary"] * 4
    assert formats[-1] == "int4-g32"
    assert len(recipe.rules) == 4  # one for experts, one for attention, two for the experts that differ


def test_frontier_is_drawn() -> None:
    from qmoe_core.htmlreport import plot_frontier

    figure = plot_frontier([(10, 2.0), (20, 0.5), (1_000_000, 0.0)], (25, 0.45), "streamed")
    line, point = figure.axes[0].lines
    assert list(line.get_ydata()) == [2.0, 0.5]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([25e-6], [0.45])
    assert "nats" in figure.axes[0].get_ylabel()
