"""Distillation: the parts of the loss as published, for models with experts, in a plain loop and in a Trainer."""

from __future__ import annotations

import copy
import doctest
import math

import pytest
import torch
from packed_fixtures import tiny_model

from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import Cubic, Distiller, Sparsifier, distillation
from qmoe_core.sparsify.distillation import EPSILON, trainer_class


@pytest.fixture(scope="module")
def models():
    """A teacher and a student that differs from it."""
    teacher = tiny_model("qwen3_moe")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return teacher, student


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_examples_of_docstrings_run():
    result = doctest.testmod(distillation)
    assert result.failed == 0 and result.attempted > 5


def test_parts_are_what_is_published(models, batch):
    """Against loops over tokens, in float64."""
    teacher, student = models
    loss = Distiller(student, teacher, ce=0.5, kl=2.0, squarehead=1.5, router=0.25, temperature=2.0)(batch)
    with torch.no_grad():
        a, b = (
            m(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True,
              output_router_logits=True) for m in (student, teacher)
        )  # fmt: skip
    predicted = [(i, j) for i in range(2) for j in range(9) if batch["labels"][i, j + 1] != -100]
    assert len(predicted) == 6 + 6  # 4..9 of the first, 1..6 of the second
    ce = kl = 0.0
    for i, j in predicted:
        ce -= float(a.logits[i, j].double().log_softmax(0)[batch["labels"][i, j + 1]])
        p, q = (x.logits[i, j].double().div(2.0).log_softmax(0) for x in (b, a))
        kl += float((p.exp() * (p - q)).sum())
    square = 0.0
    assert EPSILON == 0.0078125 and len(a.hidden_states) == 3
    for mine, theirs in list(zip(a.hidden_states, b.hidden_states, strict=True))[1:]:
        tokens = [(0, j) for j in range(10)] + [(1, j) for j in range(7)]
        f, g = (torch.stack([x[at] for at in tokens]).double() for x in (mine, theirs))
        square += float((f - g).square().mean() / (g.square().mean() + 0.0078125))
    router = []
    for mine, theirs in zip(a.router_logits, b.router_logits, strict=True):
        rows = [*range(10), *range(10, 17)]
        p, q = (x[rows].double().log_softmax(1) for x in (theirs, mine))
        router.append(float((p.exp() * (p - q)).sum(1).mean()))
    expected = {"ce": ce / 12, "kl": 4 * kl / 12, "squarehead": square, "router": sum(router) / len(router)}
    found = {name: float(part) for name, part in loss.parts.items()}
    assert found == pytest.approx(expected, rel=1e-4) and min(found.values()) > 1e-4
    weighted = 0.5 * expected["ce"] + 2 * expected["kl"] + 1.5 * expected["squarehead"] + 0.25 * expected["router"]
    assert float(loss.total.detach()) == pytest.approx(weighted, rel=1e-4)


def test_a_student_like_its_teacher_has_only_cross_entropy(models, batch):
    teacher, _ = models
    parts = Distiller(copy.deepcopy(teacher), teacher, kl=1, router=1)(batch).parts
    assert max(abs(float(parts[name])) for name in ("kl", "squarehead", "router")) < 1e-6 < float(parts["ce"])
    plain = teacher(**batch).loss
    assert float(parts["ce"]) == pytest.approx(float(plain), rel=1e-5)  # as transformers has it


def test_padding_does_not_count(models, batch):
    teacher, student = models
    distiller = Distiller(student, teacher, kl=1, router=1)
    before = distiller(batch).parts
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)}
    after = distiller(other).parts
    for name, part in before.items():
        assert float(after[name]) == pytest.approx(float(part), rel=1e-5), name


def test_a_sparse_student_learns_to_do_what_its_teacher_does(models):
    teacher, _ = models
    results = {}
    for squarehead in (0.0, 1.0):
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
        sparsifier = Sparsifier(student, "unstructured", 0.75, schedule=Cubic(0, 20, every=5)).attach(optimizer)
        distiller = Distiller(student, teacher, ce=1.0, squarehead=squarehead)
        for step in range(40):
            ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            distiller({"input_ids": ids, "labels": ids}).total.backward()
            optimizer.step()
        assert sparsifier.finish().sparsity() == pytest.approx(0.75, abs=0.01)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        held_out = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            results[squarehead] = Distiller(student, teacher)({"input_ids": held_out, "labels": held_out}).parts
    assert float(results[1.0]["squarehead"]) < 0.8 * float(results[0.0]["squarehead"])


def test_in_a_trainer(models, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    teacher, student = models
    student = copy.deepcopy(student).train()
    distiller = Distiller(student, teacher, kl=0.5, router=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    sparsifier = Sparsifier(student, "2:4").attach(optimizer)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (16, 12)).tolist()]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1,
        save_steps=3, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = trainer_class(distiller)(student, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    first = trainer.state.log_history[0]
    parts = first["loss_ce"] + 0.5 * first["loss_kl"] + first["loss_squarehead"] + 0.1 * first["loss_router"]
    assert first["loss"] == pytest.approx(parts, rel=1e-3) and math.isfinite(first["loss"])
    sparsifier.masks.check()
    assert all(int((w.parameter == 0).sum()) >= w.parameter.numel() // 2 for w in sparsifier.weights.values())
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert saved["qmoe_sparsifier"]["steps"] == 3


def test_what_makes_no_sense_is_refused(models, batch):
    teacher, student = models
    for settings in ({"ce": -1.0}, {"ce": 0.0, "squarehead": 0.0}, {"temperature": 0.0}):
        with pytest.raises(QmoeError, match="E_VALUE"):
            Distiller(student, teacher, **settings)
    with pytest.raises(QmoeError, match="labels"):
        Distiller(student, teacher)({"input_ids": batch["input_ids"]})
    with pytest.raises(QmoeError, match="E_SHAPE"):
        Distiller(tiny_model("qwen3_moe", num_hidden_layers=3), teacher)(batch)
    with pytest.raises(QmoeError, match="E_SHAPE"):
        Distiller(tiny_model("qwen3_moe", vocab_size=120), teacher, kl=1.0)(batch)
