"""Recovery: gradients, the stored numbers, output directories, resume, refusals."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qmoe_core import Recipe, compress, load_model, verify
from qmoe_core.errors import QmoeError
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix
from qmoe_core.recovery import RecoverySpec, end_to_end, recover, training
from qmoe_core.recovery.stacks import TunableStack
from qmoe_core.recovery.unpack import unpack

MODEL = Path(__file__).resolve().parents[2] / "examples" / "novels-moe"
SMALL = {"steps": 6, "batch": 2, "window": 32, "validation": 4, "checkpoint_every": 2}


def int_matrix(rng, format: IntFormat, rows=5, cols=75) -> IntMatrix:
    groups = -(-cols // (format.group or cols))
    codes = rng.integers(0, 2**format.bits, (rows, cols), dtype=np.uint8)
    scales = torch.from_numpy(rng.normal(size=(rows, groups)).astype(np.float32))
    scales = scales.to(getattr(torch, format.scale_dtype)).float().numpy()
    zeros = rng.integers(0, 2**format.bits, (rows, groups), dtype=np.uint8) if format.zero_point else None
    return IntMatrix(format, codes, scales, zeros)


def ternary_matrix(rng, levels: str, rows=5, cols=75) -> TernaryMatrix:
    trits = rng.integers(-1, 2, (rows, cols), dtype=np.int8)
    values = torch.from_numpy(rng.uniform(0.5, 2, (rows, 2)).astype(np.float32)).bfloat16().float().numpy()
    stored = values[:, 1:] if levels == "symmetric" else values * np.float32([-1, 1])
    return TernaryMatrix(TernaryFormat(levels), trits, np.ascontiguousarray(stored))


FORMATS = [
    *(IntFormat(bits, group, zero, dtype) for bits in (2, 3, 4, 8) for group, zero, dtype in (
        (32, True, "float16"), (0, False, "bfloat16"), (64, True, "float32"),
    )),
    *(IntFormat(2, group, zero, half_step=True) for group in (16, 64) for zero in (True, False)),
    IntFormat(4, 16),
    TernaryFormat("pair"),
    TernaryFormat("symmetric"),
]  # fmt: skip


def make(rng, format):
    return int_matrix(rng, format) if isinstance(format, IntFormat) else ternary_matrix(rng, format.levels)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name}-{getattr(f, 'scale_dtype', '')}")
def test_what_is_read_and_computed_is_what_the_core_decodes(format):
    rng = np.random.default_rng(1)
    packed = PackedTensor.pack([make(rng, format) for _ in range(3)])
    decoded = np.stack([packed.decode(expert) for expert in range(3)])
    stack = TunableStack(packed)
    assert np.array_equal(stack().detach().numpy(), decoded)
    with torch.no_grad():
        for part in stack.parts:
            part.change.uniform_(-0.2, 0.2)
    again = PackedTensor.pack(stack.repack(packed))
    decoded = np.stack([again.decode(expert) for expert in range(3)])
    assert np.array_equal(stack().detach().numpy(), decoded)


def test_a_record_of_mixed_formats_keeps_its_order():
    rng = np.random.default_rng(2)
    packed = PackedTensor.pack([make(rng, f) for f in (FORMATS[0], TernaryFormat(), FORMATS[4], FORMATS[0])])
    decoded = np.stack([packed.decode(expert) for expert in range(4)])
    assert np.array_equal(TunableStack(packed)().detach().numpy(), decoded)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name}-{getattr(f, 'scale_dtype', '')}")
def test_gradients_match_finite_differences(format):
    rng = np.random.default_rng(3)
    stack = TunableStack(PackedTensor.pack([make(rng, format) for _ in range(2)])).double()
    for part in stack.parts:
        part.stored = torch.float64  # rounding has no derivative; the straight-through one is that without it
    target = torch.from_numpy(rng.normal(size=(2, 5, 75)))
    (part,) = stack.parts

    def loss() -> torch.Tensor:
        return (stack() - target).square().sum()

    loss().backward()
    flat, step = part.change.data.view(-1), 1e-5
    for at in range(len(flat)):
        values = []
        for sign in (1, -1):
            flat[at] = sign * step
            values.append(float(loss().detach()))
        flat[at] = 0
        expected = (values[0] - values[1]) / (2 * step)
        assert float(part.change.grad.view(-1)[at]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_levels_of_one_sign_and_rows_without_a_level():
    levels = np.float32([[0.5, 1.0], [-1.0, -0.5], [-1.0, 2.0], [-1.0, 2.0], [-1.0, 2.0]])
    trits = np.array([[1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, -1, 0], [0, 0, 0]], dtype=np.int8)
    packed = PackedTensor.pack([TernaryMatrix(TernaryFormat(), trits, levels)])
    assert np.array_equal(unpack(packed)[0].dequantize(), packed.decode(0))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 4000, 40 * 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recovery")
    recipes = {"int2": Recipe.uniform("int2", 64), "ternary": Recipe.uniform("ternary")}
    for name, recipe in recipes.items():
        compress(MODEL, folder / name, recipe)
    return {name: folder / name for name in recipes}


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.mark.parametrize("mode", ["end-to-end", "block"])
@pytest.mark.parametrize("name", ["int2", "ternary"])
def test_recovery_lowers_the_loss_and_the_output_is_sound(models, tokens, tmp_path, name, mode):
    before = hashes(models[name])
    report = recover(MODEL, models[name], tmp_path / "out", tokens, RecoverySpec(mode=mode, **SMALL))
    assert report.final < report.initial
    assert set(report.tuned) == {"scales", "norms", "router"} and report.bytes_on_disk == sum(
        p.stat().st_size for p in (tmp_path / "out").iterdir()
    )
    result = verify(tmp_path / "out")
    assert result.ok and not result.unknown_files, result.problems
    model = load_model(tmp_path / "out", dtype=torch.float32)
    logits = model(torch.from_numpy(tokens[:32]).view(1, 32)).logits
    assert bool(logits.isfinite().all())
    assert hashes(models[name]) == before
    assert recover(MODEL, models[name], tmp_path / "out", tokens, RecoverySpec(mode=mode, **SMALL)).resumed


def test_an_interrupted_recovery_ends_with_the_same_bytes(models, tokens, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for mode in ("end-to-end", "block"):
            spec = RecoverySpec(mode=mode, average=0.9, **SMALL)
            recover(MODEL, models["int2"], tmp_path / f"whole-{mode}", tokens, spec)
            out, seen = tmp_path / f"parts-{mode}", []

            def stop(event, seen=seen, limit=5 if mode == "end-to-end" else 9):
                seen.append(event.done)
                if event.done == limit:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                recover(MODEL, models["int2"], out, tokens, spec, progress=stop)
            assert not (out / "config.json").exists()
            report = recover(
                MODEL, models["int2"], out, tokens, spec, progress=lambda event, s=seen: s.append(event.done)
            )
            assert report.resumed and min(seen[5 if mode == "end-to-end" else 9 :]) > 1
            assert hashes(out) == hashes(tmp_path / f"whole-{mode}")
    finally:
        torch.set_num_threads(threads)


def test_other_classes_of_parameters(models, tokens, tmp_path):
    spec = RecoverySpec(("attention", "embedding"), **SMALL)
    report = recover(MODEL, models["int2"], tmp_path / "out", tokens, spec)
    assert set(report.tuned) == {"attention", "embedding"} and report.final < report.initial
    assert verify(tmp_path / "out").ok


def test_refusals(models, tokens, tmp_path, monkeypatch):
    spec = RecoverySpec(**SMALL)
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(QmoeError, match="E_CHANGED"):
        recover(other, models["int2"], tmp_path / "out", tokens, spec)
    with pytest.raises(QmoeError, match=r"E_VALUE.*too few tokens"):
        recover(MODEL, models["int2"], tmp_path / "out", tokens[:100], spec)
    with pytest.raises(QmoeError, match=r"E_VALUE.*no plain tensors"):
        recover(MODEL, models["int2"], tmp_path / "out", tokens, RecoverySpec(("shared_expert",), **SMALL))
    with pytest.raises(QmoeError, match="E_SAME_FILE"):
        recover(MODEL, models["int2"], models["int2"], tokens, spec)
    for wrong in ({"parameters": ("codes",)}, {"mode": "layer"}, {"steps": 0}, {"learning_rates": {"scales": 2.0}}):
        with pytest.raises(QmoeError, match="E_VALUE"):
            RecoverySpec(**wrong)
    real = end_to_end.divergence
    calls = []

    def diverges(teacher, student, temperature):
        calls.append(1)
        return real(teacher, student, temperature) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(end_to_end, "divergence", diverges)
    with pytest.raises(QmoeError, match=r"E_VALUE.*step 2"):  # two batches were validation
        recover(MODEL, models["int2"], tmp_path / "out", tokens, spec)


def test_a_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state"
    training.save_state(path, {"a": torch.arange(3.0)})
    assert torch.equal(training.load_state(path)["a"], torch.arange(3.0))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(QmoeError, match="E_CHECKSUM"):
        training.load_state(path)
