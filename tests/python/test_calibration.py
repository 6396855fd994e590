"""Calibrated compression: what the streamed layers see, resumes, refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_fixtures import FUSED, tiny_model

import qmoe_core.quantize as methods
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.checkpoint import compress
from qmoe_core.formats import IntFormat
from qmoe_core.recipe import Recipe

WINDOW, WINDOWS = 16, 5


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.fixture
def seen(monkeypatch):
    """A calibrated method "probe" that rounds to nearest and notes (weights, statistics) by tensor."""
    calls: dict[str, list] = {}

    def round_all(weights, statistics, spec):
        return [methods.quantize(w.cpu(), methods.MethodSpec("rtn", spec.format)) for w in weights]

    real = methods.quantize_stack

    def quantize_stack(weights, statistics, spec, *, tensor=None):
        calls.setdefault(tensor, []).append((weights.clone(), statistics))
        return real(weights, statistics, spec, tensor=tensor)

    info = methods.MethodInfo(IntFormat, frozenset(), quantize_stack=round_all)
    monkeypatch.setitem(methods.METHODS, "probe", info)
    monkeypatch.setattr(methods, "quantize_stack", quantize_stack)
    return calls


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 96, WINDOW * WINDOWS)


def spec_of(tokens, **changes) -> CalibrationSpec:
    return CalibrationSpec(**{"source": tokens, "window": WINDOW, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """family -> (model, directory), made when first asked for."""
    made = {}

    def make(family: str):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model = (
                tiny_model(family, num_hidden_layers=3, sliding_window=6) if family == "gpt_oss" else tiny_model(family)
            )
            model.save_pretrained(directory)
            made[family] = (model, directory)
        return made[family]

    return make


def reference(model, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What every experts module of the whole model is called with: inputs (T, H), ids and weights (T, k)."""
    model.set_experts_implementation("eager")
    found: dict[str, list] = {}
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate"):

            def hook(_, arguments, named, name=name):
                found.setdefault(name, []).append([a.double() for a in (*arguments, *named.values())])

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(parts) for parts in zip(*calls, strict=True)) for name, calls in found.items()}


def direct_hessians(model, ids):
    """By tensor name: (tokens (E,), Hessians (E, K, K) in float64, pooled or None) of the uncompressed model."""
    result = {}
    for name, (x, index, _) in reference(model, ids).items():
        module = model.get_submodule(name)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        up, down, tokens = [], [], []
        for expert in range(module.num_experts):
            mine = x[(index == expert).any(1)]
            weight = getattr(module, first)[expert].double()
            states = mine @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                states = states + getattr(module, f"{first}_bias")[expert].double()
            states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
            up.append(mine.T @ mine)
            down.append(states.T @ states)
            tokens.append(len(mine))
        result[f"{name}.{first}"] = (tokens, torch.stack(up), x.T @ x)
        result[f"{name}.down_proj"] = (tokens, torch.stack(down), torch.stack(down).sum(0))
    return result


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.detach().abs().max()) or 1.0
    torch.testing.assert_close(actual.double(), expected.double().detach(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FUSED)
def test_statistics_are_those_of_the_whole_model(family, sources, tokens, seen, tmp_path, monkeypatch):
    """With weights left as they are, the streamed layers see what the whole model's layers see."""
    model, directory = sources(family)

    def keep(pipeline_stage, target, chunk, weights, statistics):
        original(pipeline_stage, target, chunk, weights, statistics)
        return weights

    from qmoe_core.calibration.experts import ExpertsStage

    original = ExpertsStage._quantize
    monkeypatch.setattr(ExpertsStage, "_quantize", keep)
    compress(directory, tmp_path / "out", Recipe.uniform("int4", 32, "probe"), calibration=spec_of(tokens))
    expected = direct_hessians(model, torch.from_numpy(tokens).view(WINDOWS, WINDOW))
    assert seen.keys() == expected.keys() and seen
    for name, calls in seen.items():
        ((weights, statistics),) = calls
        counts, hessian, pooled = expected[name]
        assert statistics.tokens.tolist() == counts
        close(statistics.hessian, hessian)
        close(statistics.pooled, pooled)
        parameter = model.get_parameter(name).detach()
        torch.testing.assert_close(
            weights, parameter.transpose(1, 2) if "gpt_oss" in family else parameter, rtol=0, atol=0
        )
