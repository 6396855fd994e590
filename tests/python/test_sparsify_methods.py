"""One-shot pruning against slow float64 twins written from the papers, and what each method promises."""

from __future__ import annotations

import dataclasses
import doctest
from types import ModuleType

import pytest
import torch

from qmoe_core.errors import QmoeError
from qmoe_core.quantize.base import StackStatistics
from qmoe_core.sparsify import alps, methods, sparsegpt
from qmoe_core.sparsify import spec as spec_module
from qmoe_core.sparsify.methods import METHODS, prune_stack
from qmoe_core.sparsify.patterns import NM, Pattern
from qmoe_core.sparsify.spec import PruneSpec

PATTERNS = [
    ("2:4", None),
    ("4:8", None),
    ("16:32", None),
    ("unstructured", 0.6),
    ("block:4x4", 0.5),
    ("channel:1", 0.5),
]


def problem(shape: tuple[int, int, int], tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, StackStatistics]:
    """Weights, and statistics of strongly correlated inputs of very different sizes."""
    experts, _, columns = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    mixing = mixing * torch.rand(columns, generator=generator).add(0.1)
    inputs = torch.randn(experts, tokens, columns, generator=generator) @ mixing
    hessian = inputs.transpose(1, 2) @ inputs
    return weight, StackStatistics(torch.full((experts,), tokens), hessian, hessian.sum(0), tokens * experts)


def error(weight: torch.Tensor, pruned: torch.Tensor, statistics: StackStatistics) -> float:
    """Of all outputs, relative."""
    change, hessian = (weight - pruned).double(), statistics.hessian.double()
    whole = ((weight.double() @ hessian) * weight.double()).sum()
    return float((((change @ hessian) * change).sum() / whole).sqrt())


def in_double(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Damped second moments (E, K, K), and what `inverse_factor` makes of them, in float64."""
    damped = hessian.double()
    damped = damped + 0.01 * torch.diag_embed(
        damped.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, hessian.shape[2])
    )
    return damped, *sparsegpt.inverse_factor(damped, 0.0)


@pytest.mark.parametrize(("text", "sparsity"), PATTERNS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_every_pattern(method: str, text: str, sparsity: float | None) -> None:
    weight, statistics = problem((2, 8, 160))
    spec = PruneSpec(method, Pattern.parse(text), sparsity)
    pruned = prune_stack(weight, spec, statistics, tensor="w")
    assert pruned.mask.dtype == torch.bool and pruned.weight.dtype == torch.float32
    assert bool((pruned.weight[~pruned.mask] == 0).all())
    assert spec.pattern.fits(pruned.mask)
    assert float(pruned.mask.float().mean()) == pytest.approx(1 - (sparsity or 0.5), abs=0.01)
    if not METHODS[method].updates:
        assert torch.equal(pruned.weight, weight * pruned.mask)
    again = prune_stack(weight, spec, statistics, tensor="w")
    assert torch.equal(again.weight, pruned.weight)


def test_magnitude_and_wanda_score_as_their_papers_say() -> None:
    weight, statistics = problem((1, 6, 24))
    mask = prune_stack(weight, PruneSpec("magnitude", NM(2, 4))).mask
    assert torch.equal(mask, NM(2, 4).select(weight.abs()))
    # Pooled statistics are those of the only matrix: leaning on them changes nothing.
    norms = statistics.hessian[0].double().diagonal().sqrt()
    scores = weight[0].double().abs() * norms
    for text, sparsity in (("2:4", None), ("unstructured", 0.5)):
        mask = prune_stack(weight, PruneSpec("wanda", Pattern.parse(text), sparsity), statistics).mask[0]
        expected = torch.zeros_like(mask)
        for row in range(6):
            for first in range(0, 24, 4 if sparsity is None else 24):
                group = scores[row, first : first + 4] if sparsity is None else scores[row]
                expected[row, first + group.topk(len(group) // 2).indices] = True
        assert torch.equal(mask, expected)


def test_random_differs_by_name_and_seed_only() -> None:
    weight, _ = problem((2, 8, 16))

    def mask(name: str, seed: int = 0) -> torch.Tensor:
        return prune_stack(weight, PruneSpec("random", NM(2, 4), None, {"seed": seed}), tensor=name).mask

    assert torch.equal(mask("a"), mask("a"))
    assert not torch.equal(mask("a"), mask("b")) and not torch.equal(mask("a"), mask("a", 1))


def slow_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, text: str, sparsity: float, block: int) -> torch.Tensor:
    """Algorithm 1 of the paper, one matrix, in float64; what is left of H is inverted anew for every column."""
    work, columns = weight.clone(), weight.shape[1]
    pivots = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(columns)]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(columns):
        if j % block == 0:
            end = min(j + block, columns)
            scores = work[:, j:end].square() / torch.tensor(pivots[j:end], dtype=torch.float64)
            if text == "unstructured":
                order = scores.flatten().argsort(descending=True)[: round(scores.numel() * (1 - sparsity))]
                mask[:, j:end] = (
                    torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(scores)
                )
            else:
                best = scores.argsort(dim=1, descending=True)[:, : int(text.split(":")[0])]
                mask[:, j:end] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        inverse = torch.linalg.inv(hessian[j:, j:])
        change = torch.where(mask[:, j], 0.0, work[:, j]) / inverse[0, 0]
        work[:, j:] -= change[:, None] * inverse[0]
        work[:, j] = torch.where(mask[:, j], work[:, j], 0.0)
    return work


@pytest.mark.parametrize("span", [512, 128])
@pytest.mark.parametrize(
    ("text", "group"), [("2:4", 4), ("4:8", 8), ("2:6", 6), ("16:32", 32), ("unstructured", 128)]
)  # fmt: skip
def test_sparsegpt_is_its_slow_twin(text: str, group: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "SPAN", span)
    weight, statistics = problem((2, 3, 288))
    hessian, inverse, precision = in_double(statistics.hessian / 600)
    pattern = Pattern.parse(text)
    choose = (lambda scores, _: pattern.best(scores)) if isinstance(pattern, NM) else (
        lambda scores, _: pattern.select(scores, 0.7))  # fmt: skip
    mask, pruned = sparsegpt.prune_with_feedback(weight.double(), inverse, precision, choose, group)
    expected = slow_sparsegpt(weight[1].double(), hessian[1], text, 0.7, group)
    assert torch.equal(mask[1], expected != 0)
    assert torch.allclose(pruned[1], expected, atol=1e-9)


def test_sparsegpt_in_float32_is_as_good() -> None:
    weight, statistics = problem((2, 24, 320))
    pruned = prune_stack(weight, PruneSpec("sparsegpt", NM(2, 4), None, {"prior": 0}), statistics)
    _, inverse, precision = in_double(statistics.hessian / 600)
    _, slow = sparsegpt.prune_with_feedback(
        weight.double(), inverse, precision, lambda scores, _: NM(2, 4).best(scores), 4
    )
    assert error(weight, pruned.weight, statistics) == pytest.approx(error(weight, slow, statistics), rel=2e-3)


def slow_alps(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, sparsity: float | None) -> torch.Tensor:
    """The support by ADMM, inverting in every iteration; then least squares on it row by row; in float64."""
    columns = weight.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    size = hessian.diagonal().sqrt()
    scaled, target = hessian / size.outer(size), weight * size

    def project(matrix: torch.Tensor) -> torch.Tensor:
        return matrix * pattern.select(matrix.square(), sparsity)

    rho, sparse, dual, grown = 0.1, project(target), torch.zeros_like(target), False
    before, total = sparse != 0, int((sparse != 0).sum())
    solution = target
    for iteration in range(1, 301):
        inverse = torch.linalg.inv(scaled + rho * torch.eye(columns, dtype=torch.float64))
        solution = (target @ scaled - dual + rho * sparse) @ inverse
        sparse = project(solution + dual / rho)
        dual = dual + rho * (solution - sparse)
        if iteration % 3 == 0:
            changed = int(((sparse != 0) ^ before).sum())
            before = sparse != 0
            grown = grown or changed > 0.005 * total
            if not changed and grown:
                break
            assert grown  # these problems need no smaller rho
            rho *= 1.3 if changed > 0.1 * total else 1.2 if changed > 0.005 * total else 1.1
            if iteration >= 30 and changed < 3e-4 * total:
                break
    mask = project(solution) != 0
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero()[:, 0]
        result[row, kept] = torch.linalg.solve(scaled[kept][:, kept], (target[row] @ scaled)[kept])
    return result / size


@pytest.mark.parametrize(("text", "sparsity"), [("2:4", None), ("unstructured", 0.6)])
def test_alps_is_its_slow_twin(text: str, sparsity: float | None) -> None:
    weight, statistics = problem((1, 12, 48))
    hessian = statistics.hessian[0].double() / 600
    pruned, mask = alps.prune_matrix(weight[0].double(), hessian, Pattern.parse(text), sparsity, 0.01, 0.1, 300, 200)
    expected = slow_alps(weight[0].double(), hessian, Pattern.parse(text), sparsity)
    assert torch.equal(mask, expected != 0)
    # Conjugate gradients stop at a relative residual of 1e-4.
    assert torch.allclose(pruned, expected, atol=1e-3 * float(expected.abs().max()))


def test_a_rho_so_large_that_nothing_moves_is_made_smaller() -> None:
    weight, statistics = problem((1, 12, 48))
    errors = []
    for iterations in (3, 300):
        spec = PruneSpec("alps", NM(2, 4), None, {"rho": 1e4, "iterations": iterations})
        errors.append(error(weight, prune_stack(weight, spec, statistics).weight, statistics))
    assert errors[1] < 0.995 * errors[0]


def test_more_effort_means_smaller_errors() -> None:
    """The order in which the papers have them, on strongly correlated inputs."""
    weight, statistics = problem((2, 32, 128))
    for text, sparsity in (("2:4", None), ("unstructured", 0.6)):
        errors = {
            method: error(weight, prune_stack(weight, PruneSpec(method, Pattern.parse(text), sparsity), statistics,
                                              tensor="w").weight, statistics) for method in METHODS
        }  # fmt: skip
        assert errors["alps"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < errors["random"]


def test_matrices_without_tokens_lean_on_the_layer_and_without_any_are_pruned_by_magnitude() -> None:
    weight, statistics = problem((2, 8, 32))
    none = dataclasses.replace(
        statistics, tokens=torch.tensor([600, 0]), hessian=statistics.hessian * torch.tensor([1.0, 0.0]).view(2, 1, 1),
        pooled=statistics.hessian[0], pooled_tokens=600,
    )  # fmt: skip
    pruned = prune_stack(weight, PruneSpec("wanda", NM(2, 4)), none)
    assert pruned.notes == ["", "no tokens: statistics of the layer"]
    norms = statistics.hessian[0].diagonal().sqrt()
    assert torch.equal(pruned.mask[1], NM(2, 4).select(weight[1].abs() * norms))
    nothing = StackStatistics(torch.zeros(2, dtype=torch.int64), torch.zeros_like(statistics.hessian))
    for method in ("wanda", "sparsegpt", "alps"):
        mask = prune_stack(weight, PruneSpec(method, NM(2, 4)), nothing).mask
        assert torch.equal(mask, NM(2, 4).select(weight.abs()))


def test_what_cannot_be_pruned_is_refused() -> None:
    weight, statistics = problem((2, 8, 32))

    def code(weight: torch.Tensor, statistics: StackStatistics | None, **spec: object) -> str:
        with pytest.raises(QmoeError) as caught:
            prune_stack(
                weight, PruneSpec(**{"method": "sparsegpt", "pattern": NM(2, 4), **spec}), statistics, tensor="w"
            )
        return caught.value.code

    broken = weight.clone()
    broken[1, 2, 3] = float("inf")
    assert code(broken, statistics) == "E_VALUE"
    assert code(weight, None) == "E_VALUE"
    assert code(weight[0], statistics) == "E_SHAPE"
    assert code(weight[:, :, :30], statistics) == "E_SHAPE"
    assert code(weight[:, :, :28], statistics) == "E_SHAPE"
    assert code(weight.double(), statistics) == "E_DTYPE"
    assert code(weight, dataclasses.replace(statistics, hessian=statistics.hessian * float("nan"))) == "E_VALUE"
    assert code(weight, statistics, method="guess") == "E_UNKNOWN"
    assert code(weight, statistics, options={"rho": 1.0}) == "E_UNKNOWN"
    assert code(weight, statistics, options={"damping": 2.0}) == "E_VALUE"
    assert code(weight, statistics, pattern=Pattern.parse("unstructured")) == "E_VALUE"


@pytest.mark.parametrize("module", [methods, spec_module], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 1
