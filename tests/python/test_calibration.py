"""Calibrated compression: what the streamed layers see, resumes, refusals."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import killed
from packed_fixtures import FUSED, tiny_model
from safetensors import safe_open

import qmoe_core.quantize as methods
from qmoe_core.calibration import CalibrationSpec
from qmoe_core.calibration import layer as layers
from qmoe_core.calibration.spec import load_tokens
from qmoe_core.checkpoint import compress, read_qmoe_json
from qmoe_core.errors import QmoeError
from qmoe_core.formats import IntFormat, PackedTensor
from qmoe_core.recipe import Recipe, Rule
from qmoe_core.verification import verify

WINDOW, WINDOWS = 16, 5


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch):
    monkeypatch.setattr("qmoe_core.calibration.pipeline.KEEP_SECONDS", 0.0)


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

    info = methods.MethodInfo(IntFormat, frozenset(), quantize_stack=round_all, weighs_rows=(IntFormat,))
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FUSED)
def test_statistics_on_cuda_are_those_of_the_cpu(family, sources, tokens, seen, tmp_path):
    _, directory = sources(family)
    recipe = Recipe.uniform("int8", 32, "probe", role=["expert", "attention"])
    compress(directory, tmp_path / "cpu", recipe, calibration=spec_of(tokens, drift=True))
    expected = dict(seen)
    for dtype in ("float32", "bfloat16"):
        seen.clear()
        spec = spec_of(tokens, drift=True, dtype=dtype)
        compress(directory, tmp_path / dtype, recipe, calibration=spec, device="cuda")
        assert seen.keys() == expected.keys()
        for name, ((_, statistics),) in seen.items():
            assert statistics.hessian.is_cuda
            there, here = statistics.hessian.cpu(), expected[name][0][1].hessian
            tolerance = 1e-3
            if dtype == "bfloat16":  # near ties of a router go to other experts, which moves all that comes behind it
                there, here = there.sum(0), here.sum(0)
                tolerance = 0.1 if ".layers.0." in name else 0.5
            error = float((there - here).norm() / here.norm())
            assert error < tolerance, (name, dtype, error)
    report = compress(
        directory, tmp_path / "gptq", Recipe.uniform("int3", 32, "gptq"), calibration=spec_of(tokens), device="cuda"
    )
    assert report.calibration["device"] == "cuda" and verify(tmp_path / "gptq").ok


@pytest.mark.parametrize("family", FUSED)
def test_statistics_are_those_of_the_whole_model(family, sources, tokens, seen, tmp_path, monkeypatch):
    """With weights left as they are, the streamed layers see what the whole model's layers see."""
    model, directory = sources(family)

    def keep(pipeline_stage, target, chunk, own, weights, statistics):
        original(pipeline_stage, target, chunk, own, weights, statistics)
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


def compressed_copy(model, directory: Path):
    """The model with the decoded weights of a compressed checkpoint in the place of its own."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name, entry in read_qmoe_json(directory)["packed"].items():
            packed = PackedTensor(file.get_tensor(name).numpy())
            dense = torch.from_numpy(np.stack([packed.decode(e) for e in range(packed.experts)]))
            parameter = parameters[f"{entry['module']}.{entry['parameter']}"]
            transposed = getattr(copied.get_submodule(entry["module"]), "is_transposed", False)
            parameter.data.copy_((dense.transpose(1, 2) if transposed else dense).reshape(parameter.shape))
    return copied


def mixed_recipe(family: str) -> Recipe:
    roles = ["attention", "shared_expert", "dense"] if family == "deepseek_v3" else ["attention"]
    return Recipe(
        (
            Rule.make(format="keep", match="*.layers.0.*.experts.down_proj"),
            Rule.make(format="int2", group=32, method="probe"),
            Rule.make(format="int8", group=32, role=roles[1:] or "attention", match="*.layers.0.*", method="rtn"),
            Rule.make(format="int3", group=32, role=roles, method="probe"),
        )
    )


@pytest.mark.parametrize("family", FUSED)
def test_every_stack_sees_what_the_compressed_model_gives_it(family, sources, tokens, seen, tmp_path):
    """Experts of every layer, down included, and the first linear layers of a block: all errors before them counted."""
    model, directory = sources(family)
    recipe = mixed_recipe(family)
    if family == "deepseek_v3":  # its first layer is dense
        recipe = Recipe(recipe.rules[1:])
    compress(directory, tmp_path / "out", recipe, calibration=spec_of(tokens, chunk_bytes=70_000))
    ids = torch.from_numpy(tokens).view(WINDOWS, WINDOW)
    copied = compressed_copy(model, tmp_path / "out")
    for name, (counts, hessian, pooled) in direct_hessians(copied, ids).items():
        if name.endswith("layers.0.mlp.experts.down_proj"):
            assert name not in seen
            continue
        statistics = [statistics for _, statistics in seen[name]]
        assert len(statistics) > 1  # several chunks
        assert [n for s in statistics for n in s.tokens.tolist()] == counts
        close(torch.cat([s.hessian for s in statistics]), hessian)
        if not name.endswith("down_proj"):
            close(statistics[0].pooled, pooled)
    linears = [name for name in seen if name.endswith(("layers.1.self_attn.q_proj.weight", "q_a_proj.weight"))]
    assert linears
    for name in linears:
        ((_, statistics),) = seen[name]
        assert statistics.tokens.tolist() == [WINDOW * WINDOWS] and statistics.pooled is None
        x = linear_inputs(copied, name.removesuffix(".weight"), ids)
        close(statistics.hessian[0], x.T @ x)


def linear_inputs(model, path: str, ids: torch.Tensor) -> torch.Tensor:
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: found.append(a[0].double()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0].reshape(-1, found[0].shape[-1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_drift_is_how_far_the_compressed_model_has_moved(family, sources, tokens, seen, tmp_path):
    model, directory = sources(family)
    recipe = Recipe.uniform("int2", 32, "probe", role=["expert", "attention"])
    compress(directory, tmp_path / "out", recipe, calibration=spec_of(tokens, drift=True))
    ids = torch.from_numpy(tokens).view(WINDOWS, WINDOW)
    copied = compressed_copy(model, tmp_path / "out")
    before, after = reference(model, ids), reference(copied, ids)
    for name, (x, index, _) in after.items():
        ((_, up),), ((_, down),) = seen[f"{name}.gate_up_proj"], seen[f"{name}.down_proj"]
        for expert in range(up.hessian.shape[0]):
            rows = (index == expert).any(1)
            mine, original = x[rows], before[name][0][rows]
            close(up.drift[expert], (original - mine).T @ mine)
            mine = hidden(copied.get_submodule(name), expert, mine)
            original = hidden(model.get_submodule(name), expert, original)
            close(down.drift[expert], (original - mine).T @ mine)
    name = "model.layers.1.self_attn.q_proj"
    x, original = linear_inputs(copied, name, ids), linear_inputs(model, name, ids)
    close(seen[f"{name}.weight"][0][1].drift[0], (original - x).T @ x)


def test_rows_matter_by_what_their_errors_do_to_the_output(sources, tokens, seen, tmp_path):
    """Against finite differences: the mean squared change of an expert's output per change of each row's output, times
    what the expert's output matters to the layer's."""
    for family in ("qwen3_moe", "gpt_oss"):
        model, directory = sources(family)
        seen.clear()
        recipe = Recipe.uniform("int8", 32, "probe")
        compress(directory, tmp_path / family, recipe, calibration=spec_of(tokens))
        name = "model.layers.0.mlp.experts"
        x, index, _ = reference(model, torch.from_numpy(tokens).view(WINDOWS, WINDOW))[name]
        module = copy.deepcopy(model.get_submodule(name)).double()
        importance = seen[f"{name}.gate_up_proj"][0][1].row_importance
        down_statistics = seen[f"{name}.down_proj"][0][1]
        share = down_statistics.row_importance[:, 0]  # in proportion to the expert's tokens
        assert bool((down_statistics.row_importance == share.unsqueeze(1)).all())
        torch.testing.assert_close(share / share.sum(), down_statistics.tokens / down_statistics.tokens.sum())
        transposed = (lambda w: w) if module.is_transposed else (lambda w: w.T)
        for expert in range(2):
            mine = x[(index == expert).any(1)]
            bias = module.gate_up_proj_bias[expert] if module.has_bias else 0.0
            states, down = mine @ transposed(module.gate_up_proj[expert]) + bias, transposed(module.down_proj[expert])
            for row in (0, 7, 24, 41):
                step = torch.zeros(states.shape[1], dtype=torch.float64)
                step[row] = 1e-6
                change = (module._apply_gate(states + step) - module._apply_gate(states)) @ down / 1e-6
                expected = float(share[expert] * change.detach().square().sum(1).mean())
                assert float(importance[expert, row]) == pytest.approx(expected, rel=1e-3)


def hidden(module, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = module.gate_up_proj[expert].double()
    states = x @ (weight if module.is_transposed else weight.T)
    return module._apply_gate(states + module.gate_up_proj_bias[expert].double() if module.has_bias else states)


def test_gate_weighting_scales_every_row_by_its_routing_weight(sources, tokens, seen, tmp_path):
    model, directory = sources("qwen3_moe")
    recipe = Recipe.uniform("int8", 32, "probe")
    compress(directory, tmp_path / "out", recipe, calibration=spec_of(tokens, gate_weighted=True))
    x, index, weight = reference(model, torch.from_numpy(tokens).view(WINDOWS, WINDOW))["model.layers.0.mlp.experts"]
    ((_, statistics),) = seen["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(5):
        rows, choice = torch.where(index == expert)
        scaled = x[rows] * weight[rows, choice, None]
        close(statistics.hessian[expert], scaled.T @ scaled)
    scaled = x * weight.square().mean(1, keepdim=True).sqrt()
    close(statistics.pooled, scaled.T @ scaled)


def test_the_result_does_not_depend_on_where_activations_are_kept(sources, tokens, tmp_path):
    _, directory = sources("mixtral")
    recipe = Recipe.uniform("int3", 32, "gptq")
    found = []
    for number, changes in enumerate([{}, {"buffer_bytes": 0}, {"buffer_bytes": 20_000}]):
        output = tmp_path / str(number)
        report = compress(directory, output, recipe, calibration=spec_of(tokens, drift=True, **changes))
        found.append(hashes(output))
        assert verify(output).ok and not (output / ".qmoe-journal").exists()
        for entry in report.tensors:
            assert entry.calibration["tokens"] and len(entry.calibration["tokens"]) == 4
            assert 0 < entry.relative_output_error < entry.relative_error * 1.5
        assert report.calibration["tokens"] == WINDOW * WINDOWS
        assert report.read_bytes > 0 and report.written_bytes > 0
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("changes", [{}, {"buffer_bytes": 0, "drift": True}])
def test_killed_at_any_moment_the_same_call_continues_to_the_same_bytes(sources, tokens, tmp_path, changes):
    _, directory = sources("gpt_oss")
    recipe = Recipe.uniform("int3", 32, "gptq", role=["expert", "attention"])
    torch.set_num_threads(1)

    def run(output=tmp_path / "out"):
        return compress(directory, output, recipe, calibration=spec_of(tokens, **changes), max_shard_bytes=60_000)

    assert not run(tmp_path / "reference").resumed
    expected = hashes(tmp_path / "reference")
    resumes = 0
    for action in ("fsync", "pwrite", "replace"):
        point = 1
        while killed(run, point, action):
            if point % 2:  # killed once more, a little later
                killed(run, 3, "replace")
            report = run()
            resumes += report.resumed
            assert hashes(tmp_path / "out") == expected, f"{action} {point}"
            assert not (tmp_path / "out" / ".qmoe-journal").exists()
            shutil.rmtree(tmp_path / "out")
            point = 3 * point + 2
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert resumes >= 5


GPTQ = Recipe.uniform("int4", 32, "gptq")


@pytest.mark.parametrize(("left", "expected"), [("sound", [2]), ("damaged", [0, 1, 2]), ("none", [0, 1, 2])])
def test_shards_are_written_behind_the_layers_whatever_is_left_of_activations(
    sources, tokens, tmp_path, monkeypatch, left, expected
):
    _, directory = sources("gpt_oss")
    out, journal = tmp_path / "out", tmp_path / "out" / ".qmoe-journal"
    ran, real = [], layers.Layer.run

    def run(layer):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(layer.index)
        return real(layer)

    def go(output):
        return compress(directory, output, GPTQ, calibration=spec_of(tokens), max_shard_bytes=60_000)

    go(tmp_path / "reference")
    if left == "none":  # layers take less than these
        monkeypatch.setattr("qmoe_core.calibration.pipeline.KEEP_SECONDS", 10.0)
    monkeypatch.setattr(layers.Layer, "run", run)
    with pytest.raises(KeyboardInterrupt):
        go(out)
    finished = list(out.glob("*.safetensors"))
    assert ran == [0, 1] and finished and list(journal.glob("record-*"))
    if left == "damaged":
        for file in journal.glob("activations-*"):
            file.write_bytes(bytes(file.stat().st_size))
    ran.clear()
    monkeypatch.setattr(layers.Layer, "run", lambda layer: (ran.append(layer.index), real(layer))[1])
    assert go(out).resumed
    assert ran == expected
    assert hashes(out) == hashes(tmp_path / "reference")


def refusal(*arguments, **named) -> QmoeError:
    with pytest.raises(QmoeError) as caught:
        compress(*arguments, **named)
    return caught.value


@pytest.mark.parametrize(
    ("code", "words", "changes"),
    [
        ("E_VALUE", "too few", {"window": 128}),
        ("E_VALUE", "context", {"window": 129}),
        ("E_VALUE", "too few", {"max_tokens": 8}),
        ("E_VALUE", "1-D", {"source": np.zeros((2, 64), dtype=np.int64)}),
        ("E_VALUE", "1-D", {"source": np.zeros(64)}),
        ("E_VALUE", "vocabulary", {"source": np.full(64, 96)}),
        ("E_VALUE", "vocabulary", {"source": np.full(64, -1)}),
        ("E_VALUE", "CPU", {"dtype": "bfloat16"}),
        ("E_MISSING", "no such", {"source": "absent.npy"}),
        ("E_MISSING", "no such", {"source": "absent.txt"}),
        ("E_MISSING", "", {"source": "no/such-data-set"}),
    ],
)
def test_bad_calibration_is_refused_before_anything_is_written(sources, tokens, tmp_path, code, words, changes):
    _, directory = sources("qwen3_moe")
    error = refusal(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens, **changes))
    assert error.code == code and words in str(error)
    assert not (tmp_path / "out").exists()


def test_broken_calibration_files_are_refused(sources, tmp_path):
    _, directory = sources("qwen3_moe")
    (tmp_path / "broken.npy").write_bytes(b"not numpy")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "fine.txt").write_text("but this model has no tokenizer")
    for name, code in (("broken.npy", "E_CORRUPT"), ("latin.txt", "E_CORRUPT"), ("fine.txt", "E_MISSING")):
        assert refusal(directory, tmp_path / "out", GPTQ, calibration=spec_of(tmp_path / name)).code == code


@pytest.mark.parametrize("changes", [{"window": 1}, {"batch_size": 0}, {"max_tokens": True}, {"dtype": "float16"}])
def test_settings_out_of_range_are_refused(tokens, changes):
    with pytest.raises(QmoeError, match="E_VALUE"):
        spec_of(tokens, **changes)


def test_calibration_and_recipe_must_fit(sources, tokens, tmp_path):
    _, directory = sources("qwen3_moe")
    error = refusal(directory, tmp_path / "out", GPTQ)
    assert error.code == "E_VALUE" and "gptq" in str(error)
    error = refusal(directory, tmp_path / "out", Recipe.uniform("int4"), calibration=spec_of(tokens))
    assert error.code == "E_VALUE" and "no method" in str(error)
    for device in ("cuda:99", "xpu", "nonsense"):
        error = refusal(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens), device=device)
        assert error.code == "E_NO_KERNEL"


def test_encoder_decoder_models_are_refused(tokens, tmp_path):
    tiny_model("switch_transformers").save_pretrained(tmp_path / "switch")
    error = refusal(tmp_path / "switch", tmp_path / "out", GPTQ, calibration=spec_of(tokens))
    assert error.code == "E_LAYOUT" and "decoder-only" in str(error)


def test_full_disk_is_found_at_the_start_and_the_same_call_continues(sources, tokens, tmp_path, monkeypatch):
    _, directory = sources("qwen3_moe")

    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(os, "posix_fallocate", full)
        assert refusal(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens)).code == "E_NO_SPACE"
    changed = refusal(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens[::-1]))
    assert changed.code == "E_CHANGED" and "calibration.sha256" in str(changed)
    assert compress(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens)).resumed


def test_damaged_activations_and_records_are_made_anew(sources, tokens, tmp_path):
    """After a power cut the journal may tell more than the disk kept."""
    _, directory = sources("qwen3_moe")

    def run(output: Path):
        return compress(directory, output, GPTQ, calibration=spec_of(tokens))

    run(tmp_path / "reference")
    for pattern in ("activations-compressed-1", "record-*"):
        assert killed(lambda: run(tmp_path / "out"), 4, "replace")  # in the second layer
        damaged = sorted((tmp_path / "out" / ".qmoe-journal").glob(pattern))
        for file in damaged:
            file.write_bytes(bytes(file.stat().st_size))
        assert damaged
        assert run(tmp_path / "out").resumed
        assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")
        shutil.rmtree(tmp_path / "out")


def test_more_windows_than_wanted_are_drawn_by_the_seed(tokens, tmp_path):
    def chosen(**changes):
        return load_tokens(spec_of(tokens, max_tokens=2 * WINDOW + 3, **changes), tmp_path, 96).ids

    windows = tokens.reshape(WINDOWS, WINDOW)
    np.testing.assert_array_equal(chosen(seed=None), windows[:2])
    for seed in range(4):
        ids = chosen(seed=seed)
        np.testing.assert_array_equal(ids, chosen(seed=seed))
        places = [int(np.flatnonzero((windows == window).all(1))[0]) for window in ids]
        assert places == sorted(set(places)) and len(places) == 2


def test_progress_goes_up_to_all_bytes_of_the_layers(sources, tokens, tmp_path):
    _, directory = sources("qwen3_moe")
    events = []
    compress(directory, tmp_path / "out", GPTQ, calibration=spec_of(tokens, chunk_bytes=1), progress=events.append)
    done = [event.done for event in events if event.stage == "calibrate"]
    assert len(done) >= 2 * 5 and done == sorted(done)
    assert done[-1] == events[0].total
