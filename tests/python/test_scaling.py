"""Scaling laws of sparse models: published constants and runs, optima against searches, fits, files, the command."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qmoe_core import QmoeError
from qmoe_core.sparsify import scaling, scaling_fit, scaling_plots
from qmoe_core.sparsify.scaling import ScalingFit, ScalingLaw, load_law, save_law

RUNS = Path(__file__).resolve().parents[2] / "bench" / "compression" / "scaling"
LAWS = {"t5": ScalingLaw.t5(), "vit": ScalingLaw.vit()}


def runs(name: str) -> tuple[np.ndarray, ...]:
    """Published runs (google-research/jaxpruner, projects/bigsparse): S, N, D, L."""
    return tuple(np.loadtxt(RUNS / f"{name}.csv", delimiter=",", skiprows=1).T)


@pytest.fixture(scope="module")
def vit_fit() -> ScalingFit:
    return ScalingLaw.fit(*runs("vit"), residual="linear", delta=0.01, bootstrap=100)


def test_published_runs_are_all_there() -> None:
    assert runs("vit")[0].size == 112 and runs("t5")[0].size == 48


def test_the_vit_fit_is_the_published_one(vit_fit: ScalingFit) -> None:
    assert vit_fit.objective == pytest.approx(4.929e-4, rel=1e-4)
    published = ScalingLaw.vit()
    for name in ("a_s", "b_s", "c_s", "b_n", "a_d", "b_d", "c"):
        assert getattr(vit_fit.law, name) == pytest.approx(getattr(published, name), rel=5e-4), name
    assert (vit_fit.objectives <= vit_fit.objective * (1 + 1e-4)).sum() >= 20  # of 25 starts


def test_the_t5_fit_is_better_than_the_published_one_and_extrapolates_worse() -> None:
    s, n, d, loss = runs("t5")
    fit = ScalingLaw.fit(s, n, d, loss, bootstrap=0)
    residual = np.abs(np.log(ScalingLaw.t5().predict(s, n, d) / loss))
    published = np.where(residual > 1e-3, 1e-3 * (residual - 0.5e-3), residual**2 / 2).mean()
    assert published == pytest.approx(7.60e-6, rel=2e-3) and fit.objective < 4.9e-6
    held_out = 0.75, 48 * 12 * 1024**2, 500_000 * 65_536
    errors = [law.predict(*held_out) / 1.4827780204906797 - 1 for law in (ScalingLaw.t5(), fit.law)]
    assert abs(errors[0]) < 0.011 < abs(errors[1]) < 0.02


@pytest.mark.parametrize(
    ("name", "gains", "limit"), [("t5", [1.59, 2.16, 2.63, 2.98], 3.64), ("vit", [1.60, 2.17, 2.63, 2.96], 3.47)]
)
def test_gains_are_the_published_ones(name: str, gains: list[float], limit: float) -> None:
    law = LAWS[name]
    assert law.gain([0.5, 0.75, 0.875, 0.9375]) == pytest.approx(gains, abs=0.006)
    assert law.gain(0) == 1.0 and law.gain(1 - 1e-12) == pytest.approx(limit, abs=0.005)
    # What "as good as" means, at any size and amount of data:
    assert law.predict(0.75, 1e9, 1e10) == pytest.approx(law.predict(0, law.dense_equivalent(0.75, 1e9), 1e10))


@pytest.mark.parametrize("cost", ["dense", "gradual"])
@pytest.mark.parametrize("name", list(LAWS))
def test_optimal_sparsity_is_that_of_a_grid_search(name: str, cost: scaling.Cost) -> None:
    law, grid = LAWS[name], np.linspace(0, 1, 200_001)[:-1]
    sizes, budgets = np.geomspace(1e6, 1e10, 5), np.geomspace(1e17, 1e23, 4)
    found = law.optimal_sparsity(sizes[:, None], budgets, cost)
    assert found.shape == (5, 4) and (found == 0).any() and (found > 0.5).any()
    for i, n in enumerate(sizes):
        for j, c in enumerate(budgets):
            best = grid[np.argmin(law.predict(grid, n, law.data_for(grid, n, c, cost)))]
            assert found[i, j] == pytest.approx(best, abs=1e-5)
            assert law.optimal_sparsity(n, c, cost) == found[i, j]


def test_the_cost_of_gradual_pruning_is_the_mean_over_its_schedule() -> None:
    t = (np.arange(200_000) + 0.5) / 200_000
    sparsity = 0.8 * (1 - (1 - np.clip((t - 0.25) / 0.5, 0, 1)) ** 3)
    mean = ((1 - sparsity) / (1 - 0.8)).mean()  # parameters in use, in nonzeros of the end
    assert 1e20 / (6 * 1e8 * ScalingLaw.t5().data_for(0.8, 1e8, 1e20, "gradual")) == pytest.approx(mean, rel=1e-6)


def test_flops_of_another_unit_of_data_change_the_data_and_not_the_choice() -> None:
    law = ScalingLaw.vit()
    assert law.data_for(0.5, 1e7, 1e20, flops=12) == law.data_for(0.5, 1e7, 1e20) / 2
    for cost in ("dense", "gradual"):
        assert law.optimal_sparsity(1e7, 2e18, cost, flops=12) == pytest.approx(law.optimal_sparsity(1e7, 1e18, cost))


@pytest.mark.parametrize("residual", ["log", "linear"])
def test_a_fit_recovers_a_law_from_its_own_losses(residual: scaling_fit.Residual) -> None:
    s, n, d, _ = runs("t5")
    law = ScalingLaw(20.0, 0.9, 60.0, 0.3, 4e8, 0.25, 1.1)
    fit = ScalingLaw.fit(s, n, d, law.predict(s, n, d), residual=residual, bootstrap=0, seed=3)
    assert fit.law.gain(0.75) == pytest.approx(law.gain(0.75), rel=1e-3)
    assert fit.law.predict(0.9, 1e9, 1e12) == pytest.approx(law.predict(0.9, 1e9, 1e12), rel=1e-3)
    with pytest.raises(QmoeError, match="E_MISSING"):
        fit.interval(lambda law: law.c)


def test_outliers_hardly_move_a_fit() -> None:
    s, n, d, _ = runs("t5")
    loss = ScalingLaw.t5().predict(s, n, d)
    loss[7] *= 1.3
    fit = ScalingLaw.fit(s, n, d, loss, bootstrap=0)
    assert fit.law.gain(0.75) == pytest.approx(ScalingLaw.t5().gain(0.75), rel=0.01)
    assert fit.errors[7] == pytest.approx(1 / 1.3 - 1, abs=0.01)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    s, n, d, _ = runs("t5")
    law, inside = ScalingLaw.t5(), 0
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.003, s.size)
        fit = ScalingLaw.fit(s, n, d, law.predict(s, n, d) * np.exp(noise), starts=4, bootstrap=40, seed=seed)
        low, high = fit.interval(lambda law: law.gain(0.75), level=0.9)
        assert low < high
        inside += low < law.gain(0.75) < high
    assert inside >= 15  # 18 expected


def test_intervals_follow_the_level_and_shape(vit_fit: ScalingFit) -> None:
    wide, narrow = (vit_fit.interval(lambda law: law.gain([0.5, 0.75]), level) for level in (0.9, 0.5))
    assert wide[0].shape == (2,) and (wide[0] < narrow[0]).all() and (narrow[1] < wide[1]).all()
    assert (wide[0] < vit_fit.law.gain([0.5, 0.75])).all() and (vit_fit.law.gain([0.5, 0.75]) < wide[1]).all()
    with pytest.raises(QmoeError, match="E_VALUE"):
        vit_fit.interval(lambda law: law.c, level=1.0)


def test_the_gradient_is_the_slope() -> None:
    s, n, d, loss = runs("t5")
    cases: tuple[tuple[scaling_fit.Residual, float], ...] = (("log", 0.01), ("linear", 0.05))
    for residual, delta in cases:
        weights = np.linspace(0.5, 2, s.size)
        problem = scaling_fit._Problem(np.log1p(-s), np.log(n) - 16, np.log(d) - 24, loss, weights, residual, delta)
        theta = problem.start(np.random.default_rng(1))
        value, gradient = problem(theta)
        for i in range(7):
            step = np.zeros(7)
            step[i] = 1e-6
            slope = (problem(theta + step)[0] - problem(theta - step)[0]) / 2e-6
            assert gradient[i] == pytest.approx(slope, rel=1e-4, abs=1e-9 * value)


def without(name: str, level: float) -> tuple[np.ndarray, ...]:
    columns = dict(zip(("S", "N", "D", "L"), runs("t5"), strict=True))
    return tuple(column[columns[name] == level] for column in columns.values())


@pytest.mark.parametrize(
    ("code", "columns"),
    [
        ("E_SHAPE", ([0.5] * 9, [1e6] * 9, [1e9] * 9, [2.0] * 8)),
        ("E_SHAPE", (0.5, 1e6, 1e9, 2.0)),
        ("E_VALUE", ([1.0] * 9, [1e6] * 9, [1e9] * 9, [2.0] * 9)),
        ("E_VALUE", ([0.5] * 9, [0.0] * 9, [1e9] * 9, [2.0] * 9)),
        ("E_VALUE", ([0.5] * 9, [1e6] * 9, [1e9] * 9, [float("nan")] * 9)),
        ("E_VALUE", ([0, 0.5, 0.75], [1e6, 1e7, 1e8], [1e9, 1e10, 1e11], [3.0, 2.0, 1.0])),
        ("E_VALUE", without("S", 0.5)),
    ],
)
def test_runs_that_determine_nothing_are_refused(code: str, columns: tuple[object, ...]) -> None:
    with pytest.raises(QmoeError, match=code):
        ScalingLaw.fit(*columns)  # type: ignore[arg-type]


def test_arguments_outside_their_ranges_are_refused() -> None:
    law = ScalingLaw.t5()
    for call in (
        lambda: law.predict(1.0, 1e9, 1e9),
        lambda: law.predict(-0.1, 1e9, 1e9),
        lambda: law.predict(0.5, [1e9, 0], 1e9),
        lambda: law.predict(0.5, 1e9, float("nan")),
        lambda: law.gain(float("nan")),
        lambda: law.optimal_sparsity(1e9, float("inf")),
        lambda: law.optimal_sparsity(1e9, 1e20, flops=0),
        lambda: ScalingLaw(1, 1, 1, 1, 1, 1, 0),
        lambda: ScalingLaw.fit(*runs("t5"), delta=0),
        lambda: ScalingLaw.fit(*runs("t5"), starts=0),
    ):
        with pytest.raises(QmoeError, match="E_VALUE"):
            call()
    with pytest.raises(QmoeError, match="E_UNKNOWN"):
        law.optimal_sparsity(1e9, 1e20, "free")  # type: ignore[arg-type]
    with pytest.raises(QmoeError, match="E_UNKNOWN"):
        ScalingLaw.fit(*runs("t5"), residual="square")  # type: ignore[arg-type]


def test_laws_survive_a_file_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    save_law(path, ScalingLaw.vit())
    assert load_law(path) == ScalingLaw.vit()
    good = json.loads(path.read_text())
    for text, code in (
        ("[]", "E_CORRUPT"),
        ("{", "E_CORRUPT"),
        ("{}", "E_CORRUPT"),
        (json.dumps(good | {"e": 1}), "E_CORRUPT"),
        (json.dumps(good | {"c": None}), "E_CORRUPT"),
        (json.dumps(good | {"c": "x"}), "E_CORRUPT"),
        (json.dumps(good | {"c": -1}), "E_VALUE"),
    ):
        path.write_text(text)
        with pytest.raises(QmoeError, match=code) as caught:
            load_law(path)
        assert caught.value.file == str(path)


def test_plots_draw_what_they_are_given(vit_fit: ScalingFit, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ax = scaling_plots.plot_fit(vit_fit)
    assert sum(np.size(line.get_xdata()) for line in ax.lines) == 112 + 2
    legend = ax.get_legend()
    assert legend is not None and len(legend.get_texts()) == 5
    scaling_plots.save(tmp_path / "fit.svg", ax)
    assert (tmp_path / "fit.svg").read_text().count("<svg") == 1
    ax = scaling_plots.plot_optimal(vit_fit.law, np.geomspace(1e6, 1e9, 20), np.geomspace(1e17, 1e22, 20), ax=None)
    assert ax.get_xscale() == "log" and len(ax.collections) >= 1
    with pytest.raises(QmoeError, match="E_SHAPE"):
        scaling_plots.plot_optimal(vit_fit.law, [1e6], [1e17, 1e18])


def qmoe(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qmoe_core", "scaling", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_fits_writes_and_uses_a_law(tmp_path: Path) -> None:
    law = tmp_path / "law.json"
    fitted = qmoe("fit", RUNS / "vit.csv", "--residual", "linear", "--delta", 0.01, "-o", law, "--json")
    result = json.loads(fitted.stdout)
    assert fitted.returncode == 0 and result["objective"] == pytest.approx(4.929e-4, rel=1e-4)
    assert result["intervals"]["b_n"][0] < result["law"]["b_n"] < result["intervals"]["b_n"][1]
    sparse = json.loads(qmoe("predict", "-s", 0.75, "-n", 1e7, "-d", 1e9, "--law", law, "--json").stdout)
    assert sparse["loss"] == load_law(law).predict(0.75, 1e7, 1e9) and sparse["gain"] == load_law(law).gain(0.75)
    best = json.loads(qmoe("optimal", "-n", 1e9, "-c", 1e22, "--json").stdout)
    assert best["sparsity"] == ScalingLaw.t5().optimal_sparsity(1e9, 1e22, "gradual")
    assert best["loss"] < best["dense_loss"]
    assert "sparsity 0.471" in qmoe("optimal", "-n", 1e9, "-c", 1e22, "--cost", "dense").stdout


def test_the_command_refuses_what_is_wrong(tmp_path: Path) -> None:
    assert qmoe("predict", "-s", 1.5, "-n", 1e7, "-d", 1e9).returncode == 3
    assert qmoe("predict", "-s", 0.5, "-n", 1e7, "-d", 1e9, "--law", tmp_path / "none.json").returncode == 5
    file = tmp_path / "runs.csv"
    header = "sparsity,nonzero_parameters,data,loss"
    for text, code in (("sparsity,data,loss\n0,1,1\n", "E_MISSING"), (f"{header}\n0,1,x,2\n", "E_CORRUPT")):
        file.write_text(text)
        answer = json.loads(qmoe("fit", file, "--json").stdout)
        assert answer["error"]["code"] == code and answer["exit_code"] == 3


def test_scaling_laws_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from qmoe_core.sparsify import ScalingLaw; ScalingLaw.t5().gain(0.5)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_examples_run() -> None:
    results = doctest.testmod(scaling)
    assert results.attempted > 5 and results.failed == 0
