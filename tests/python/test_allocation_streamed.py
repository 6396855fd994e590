"""Losses measured while the model streams by, and compressions with a budget that use them."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_fixtures import FUSED, tiny_model
from test_calibration import close, direct_hessians, reference
from typer.testing import CliRunner

import qmoe_core.allocation.fit as fitting
import qmoe_core.allocation.streamed as streamed
import qmoe_core.calibration.layer as layers
import qmoe_core.calibration.probes as probes
from qmoe_core.allocation import Fit, streamed_losses
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.checkpoint import compress, read_qmoe_json
from qmoe_core.cli.app import app
from qmoe_core.errors import QmoeError
from qmoe_core.evaluation import evaluate
from qmoe_core.formats import PackedTensor
from qmoe_core.generation import load_model
from qmoe_core.journal import DIRECTORY
from qmoe_core.quantize import StackStatistics, quantize_stack
from qmoe_core.quantize.estimate import Estimator, int_bytes
from qmoe_core.recipe import Recipe, Rule
from qmoe_core.verification import verify

WINDOW, WINDOWS = 16, 6
CANDIDATES = (
    {"format": "ternary", "method": "gptq", "options": {"rate": 2.0}},
    {"format": "int2", "group": 32, "method": "gptq"},
    {"format": "int4", "group": 32, "method": "gptq"},
    {"format": "int8", "group": 32},
    {"format": "keep"},
)


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch):
    monkeypatch.setattr("qmoe_core.calibration.pipeline.KEEP_SECONDS", 0.0)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, WINDOW * WINDOWS)


def spec_of(tokens: np.ndarray, **changes) -> CalibrationSpec:
    return CalibrationSpec(**{"source": tokens, "window": WINDOW, "batch_size": 4, **changes})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def make(family: str):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model = tiny_model(family)
            model.save_pretrained(directory)
            made[family] = (model, directory)
        return made[family]

    return make


@pytest.fixture
def source(sources) -> Path:
    return sources("qwen3_moe")[1]


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


# What is measured.


def stack(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, StackStatistics]:
    """Weights, and statistics of inputs that are as correlated as real ones."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(2, 0.1, columns)
    x = torch.randn(experts, 200, columns, generator=generator) @ mixing.T
    importance = torch.rand(experts, rows, generator=generator) + 0.5
    weights = torch.randn(experts, rows, columns, generator=generator)
    tokens = torch.full((experts,), 200)
    return weights, StackStatistics(tokens, x.transpose(1, 2) @ x, None, 0, None, importance)


@pytest.mark.parametrize("settings", CANDIDATES[:4], ids=lambda s: s["format"])
def test_estimates_are_what_the_method_makes(settings):
    weights, statistics = stack(2, 256, 96)
    spec = Rule.make(**settings).spec
    made = quantize_stack(weights, statistics, spec)
    hessian = statistics.hessian / 200
    residual = weights - torch.from_numpy(np.stack([matrix.dequantize() for matrix, _ in made]))
    error = ((residual @ hessian * residual).sum(2) * statistics.row_importance).sum(1)
    nbytes = PackedTensor.pack([matrix for matrix, _ in made]).nbytes
    whole, part = (Estimator(weights, statistics, rows).of(spec) for rows in (256, 96))
    # An estimate tries fewer scales.
    torch.testing.assert_close(
        whole.errors.float(), error, rtol=0.05 if settings["format"] in ("int2", "int4") else 1e-4, atol=0
    )
    assert whole.nbytes == nbytes
    torch.testing.assert_close(part.errors.float(), error, rtol=0.2, atol=0)
    if settings["format"] == "ternary":  # lanes of a block are filled with fewer rows
        assert nbytes < part.nbytes < nbytes * 1.1
    else:
        assert part.nbytes == int_bytes(spec.format, weights.shape) == nbytes


@pytest.mark.parametrize("family", FUSED)
def test_probes_are_not_in_the_statistics(family, sources, tokens, monkeypatch):
    model, directory = sources(family)
    seen: dict[str, list] = {}

    class Notes(streamed.Collector):
        def __call__(self, target, weights, statistics, factor):
            seen.setdefault(target.name, []).append((weights.clone(), statistics, factor))
            super().__call__(target, weights, statistics, factor)

    monkeypatch.setattr(streamed, "Collector", Notes)
    items = streamed_losses(directory, spec_of(tokens, chunk_bytes=70_000), CANDIDATES)
    assert {item.name for item in items} == seen.keys()
    ids = torch.from_numpy(tokens).view(-1, WINDOW)
    routing = reference(model, ids)
    for name, (counts, hessian, pooled) in direct_hessians(model, ids).items():
        statistics = [statistics for _, statistics, _ in seen[name]]
        assert [n for s in statistics for n in s.tokens.tolist()] == counts
        close(torch.cat([s.hessian for s in statistics]), hessian)
        if not name.endswith("down_proj"):
            close(statistics[0].pooled, pooled)
        _, index, weight = routing[name.rpartition(".")[0]]
        gates = [float(weight[index == expert].square().sum()) / max(1, n) for expert, n in enumerate(counts)]
        close(torch.cat([factor for _, _, factor in seen[name]]), torch.tensor(gates))
    for item in items:
        losses = {candidate.settings["format"]: candidate.loss for candidate in item.candidates}
        assert losses["ternary"] > losses["int2"] > losses["int4"] > losses["int8"] > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gains_are_those_of_the_whole_model(family, sources, tokens, monkeypatch):
    """The same noise in forward hooks of the whole model."""
    model, directory = sources(family)
    found = []

    class Notes(streamed.Collector):
        def take(self, result):
            found.append(result.gains)
            return super().take(result)

    monkeypatch.setattr(streamed, "Collector", Notes)
    streamed_losses(directory, spec_of(tokens), CANDIDATES[-2:-1])
    ids = torch.from_numpy(tokens).view(-1, WINDOW)
    disturbing = probes.Probes(len(model.model.layers), ids)
    assert (disturbing.windows, disturbing.layers) == (WINDOWS, [0, 1])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
        for layer, module in enumerate(model.model.layers):

            def hook(_, arguments, output, layer=layer):
                output = output.clone()
                disturbing.disturb(layer, disturbing.start + layer * WINDOWS, arguments[0], output)
                return output

            handle = module.register_forward_hook(hook)
            disturbed = model(input_ids=ids).logits.log_softmax(-1)
            handle.remove()
            divergence = (expected.exp() * (expected - disturbed)).sum(-1).mean()
            assert found[-1][layer] == pytest.approx(float(divergence) / probes.SHARE, rel=0.02)
    assert found[:-1] == [None] * (len(found) - 1)


def test_a_model_that_collects_router_logits_is_measured_all_the_same(tokens, tmp_path):
    found = []
    for number, collects in enumerate((False, True)):
        tiny_model("mixtral", output_router_logits=collects).save_pretrained(tmp_path / str(number))
        items = streamed_losses(tmp_path / str(number), spec_of(tokens), CANDIDATES[2:3])
        found.append([item.candidates for item in items])
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_cuda_are_those_of_the_cpu(source, tokens):
    roles = ("expert", "attention")
    here, there = (
        streamed_losses(source, spec_of(tokens), CANDIDATES, roles=roles, device=device) for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(here, there, strict=True):
        for a, b in zip(ours.candidates, theirs.candidates, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=0.05) and b.nbytes == pytest.approx(a.nbytes, rel=0.05)


def test_noise_has_its_share_of_the_energy_and_only_behind_its_layer(tokens):
    ids = torch.from_numpy(tokens).view(-1, WINDOW)
    disturbing = probes.Probes(40, ids)
    assert len(disturbing.layers) == probes.PROBED and disturbing.layers[0] == 0 and disturbing.layers[-1] == 39
    before, after = torch.randn(2, 3, WINDOW, 8, generator=torch.Generator().manual_seed(0))
    probed = disturbing.layers[4]
    first = disturbing.start + 4 * disturbing.windows - 1  # the last copy of the probe before, and two of this one
    changed = after.clone()
    disturbing.disturb(probed, first, before, changed)
    assert torch.equal(changed[0], after[0])
    share = (changed - after)[1:].square().mean((1, 2)) / after[1:].square().mean((1, 2))
    torch.testing.assert_close(share, torch.full((2,), probes.SHARE), rtol=1e-4, atol=0)
    disturbing.disturb(probed + 1, first, before, changed)
    assert torch.equal(changed[0], after[0])


def test_losses_are_about_what_compression_costs(sources, tokens, tmp_path):
    """Everything in 8 bits and in 4: the predicted divergence against the measured one, on the text that both saw."""
    _, directory = sources("qwen3_moe")
    roles = ("expert", "attention")
    items = streamed_losses(directory, spec_of(tokens), CANDIDATES, roles=roles)
    original = load_model(directory, dtype=torch.float32)
    for number in (2, 3):
        recipe = Recipe((Rule.make(**CANDIDATES[number], role=roles),))
        calibration = spec_of(tokens) if recipe.calibrated else None
        output = compress(directory, tmp_path / str(number), recipe, calibration=calibration).output
        measured = evaluate(load_model(output, dtype=torch.float32), tokens, reference=original, window=WINDOW).kl
        predicted = sum(item.candidates[number].loss for item in items)
        assert 0.3 < predicted / measured < 3


# Compressing with a budget.


def fit_of(source: Path, tokens: np.ndarray, tmp_path: Path, share: float, **changes) -> Fit:
    """A budget that part of the way from the smallest to the largest plan leads to."""
    with pytest.raises(QmoeError) as error:
        compress(source, tmp_path / "probe", Fit(1, candidates=CANDIDATES, **changes), calibration=spec_of(tokens))
    smallest = int(str(error.value.expected).split()[1])
    return Fit(int(smallest * (1 + share)), candidates=CANDIDATES, **changes)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_budgets_are_kept_and_the_report_says_how(family, sources, tokens, tmp_path):
    _, source = sources(family)
    allow = ("attention", "shared_expert", "dense") if family == "deepseek_v3" else ("attention",)
    losses = []
    for share in (0.03, 0.2):
        fit, told = fit_of(source, tokens, tmp_path, share, allow=allow), []
        report = compress(source, tmp_path / str(share), fit, calibration=spec_of(tokens), planned=told.append)
        assert report.bytes_on_disk <= report.fit["predicted_bytes"] <= fit.size
        assert told == [report.fit] and read_qmoe_json(report.output)["job"]["fit"] == report.fit
        solution = report.fit["allocation"]
        assert solution["bound"] <= solution["loss"] and solution["gap"] == 0
        sizes, least = zip(*report.fit["frontier"], strict=True)
        assert list(sizes) == sorted(sizes) and list(least) == sorted(least, reverse=True)
        assert sum(sum(counts.values()) for counts in report.fit["counts"].values()) >= len(report.tensors)
        assert verify(report.output).ok
        losses.append(solution["loss"])
    assert losses[0] > losses[1]


def test_a_kill_while_measuring_loses_one_layer_and_the_plan_stays(source, tokens, tmp_path, monkeypatch):
    fit = fit_of(source, tokens, tmp_path, 0.1)
    calibration = spec_of(tokens)
    compress(source, tmp_path / "whole", fit, calibration=calibration)
    whole = hashes(tmp_path / "whole")
    ran = []
    real = layers.Layer.run

    def run(layer):
        measuring = layer.p.measure is not None
        if (measuring, layer.index) == stop:
            raise KeyboardInterrupt
        ran.append((measuring, layer.index))
        return real(layer)

    monkeypatch.setattr(layers.Layer, "run", run)
    out = tmp_path / "out"
    for stop in ((True, 1), (False, 1)):  # noqa: B007  # read by `run`
        with pytest.raises(KeyboardInterrupt):
            compress(source, out, fit, calibration=calibration)
        assert not (out / "config.json").exists()
    stop = None
    report = compress(source, out, fit, calibration=calibration)
    assert ran == [(True, 0), (True, 1), (False, 0), (False, 1)]
    assert hashes(out) == whole and not (out / DIRECTORY).exists() and report.resumed
    # Finished, the same call reports; another budget is another job.
    assert compress(source, out, fit, calibration=calibration).fit == report.fit
    with pytest.raises(QmoeError) as error:
        compress(source, out, Fit(fit.size + 1, candidates=CANDIDATES), calibration=calibration)
    assert error.value.code == "E_CHANGED" and ran[4:] == []


def test_another_budget_takes_up_what_was_measured(source, tokens, tmp_path, monkeypatch):
    fit = fit_of(source, tokens, tmp_path, 0.1)  # has left its losses in the output "probe"
    monkeypatch.setattr(streamed, "Collector", None)
    report = compress(source, tmp_path / "probe", fit, calibration=spec_of(tokens))
    assert report.bytes_on_disk <= fit.size


def test_outputs_of_other_jobs_are_refused(source, tokens, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(QmoeError) as error:
        compress(source, out, Fit(10**6), calibration=spec_of(tokens))
    assert error.value.code == "E_VALUE" and [path.name for path in out.iterdir()] == ["notes.txt"]
    compress(source, tmp_path / "plain", Recipe.uniform("int8", 32))
    with pytest.raises(QmoeError) as error:
        compress(source, tmp_path / "plain", Fit(10**6))
    assert error.value.code == "E_CHANGED"


def test_an_output_beyond_its_budget_is_an_error_and_stays(source, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "directory_overhead", lambda *_, **__: 1000)
    fit = Fit(50_000, candidates=CANDIDATES[:1])
    for _ in range(2):
        with pytest.raises(QmoeError, match="larger than the budget") as error:
            compress(source, tmp_path / "out", fit, calibration=spec_of(tokens))
        assert error.value.actual > fit.size
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    "arguments", [{}, {"size": 10, "bits": 2.0}, {"size": 10, "allow": ("router",)}, {"bits": -1.0}, {"size": "many"}]
)
def test_budgets_that_are_none(source, arguments, tmp_path):
    with pytest.raises(QmoeError) as error:
        compress(source, tmp_path / "out", Fit(**arguments))
    assert error.value.code == "E_VALUE" and not (tmp_path / "out").exists()


def test_the_command_line_tells_the_plan_and_draws_the_frontier(source, tokens, tmp_path):
    np.save(tmp_path / "tokens.npy", tokens)
    options = ["compress", str(source), "-o", str(tmp_path / "out"), "--bits", "60", "--allow", "attention"]
    options += ["--calibration", str(tmp_path / "tokens.npy"), "--calibration-window", str(WINDOW)]
    options += ["--html", str(tmp_path / "page")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.stderr
    for text in ("budget", "predicted loss", "nats per token", "no choice is better", "attention tensors"):
        assert text in result.stdout
    assert result.stdout.index("predicted loss") < result.stdout.index("bits per parameter")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "What a budget buys" in page and "no choice within the budget" in page
    assert (tmp_path / "page" / "frontier.png").stat().st_size > 10_000
    again = CliRunner().invoke(app, [*options, "--json"])
    report = json.loads(again.stdout)
    assert report["fit"]["basis"] == "streamed" and report["bits_per_parameter"] <= 60
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "predicted loss" in shown


def test_several_processes_plan_as_one(source, tokens, tmp_path):
    from test_distributed import together

    fit = fit_of(source, tokens, tmp_path, 0.1, allow=("attention",))
    alone = compress(source, tmp_path / "alone", fit, calibration=spec_of(tokens)).fit

    def work(rank: int) -> dict:
        return compress(source, tmp_path / "out", fit, calibration=spec_of(tokens)).fit

    first, second = together(2, tmp_path, work)
    assert isinstance(first, dict), first
    assert pickle.dumps(first) == pickle.dumps(second)
    assert first["predicted_bytes"] <= fit.size
    # The probes are other windows, and as many more.
    assert first["allocation"]["loss"] == pytest.approx(alone["allocation"]["loss"], rel=0.3)
