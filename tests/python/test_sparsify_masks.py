"""Patterns choose what a plain definition chooses, distributions add up, files give masks back or say why not."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qmoe_core import sparsify
from qmoe_core.errors import QmoeError
from qmoe_core.sparsify import NM, MaskFile, Masks, Pattern, coding, distribute
from qmoe_core.sparsify.distribution import kth_largest
from qmoe_core.sparsify.maskfile import EncodedMask

PATTERNS = ["1:2", "2:4", "1:4", "4:8", "16:32", "block:2x4", "block:2x4:max", "channel:0", "channel:1", "unstructured",
            "unstructured:row"]  # fmt: skip


def refused(code: str, call: object, *arguments: object, **named: object) -> QmoeError:
    with pytest.raises(QmoeError) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    assert caught.value.code == code
    return caught.value


def best(values: list[float], keep: int) -> list[bool]:
    """The definition: by falling score, then by rising index."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))[:keep]
    return [index in order for index in range(len(values))]


def slow_mask(pattern: str, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """One matrix (N, K), by loops."""
    rows, columns = scores.shape
    kind, _, rest = pattern.partition(":")
    if kind.isdigit():
        n, m = int(kind), int(rest)
        groups = scores.reshape(-1, m).tolist()
        return torch.tensor([best(group, n) for group in groups]).view(rows, columns)
    if pattern == "unstructured":
        size = rows * columns
        return torch.tensor(best(scores.flatten().tolist(), round(size * (1 - sparsity)))).view(rows, columns)
    if pattern == "unstructured:row":
        return torch.tensor([best(row, round(columns * (1 - sparsity))) for row in scores.tolist()])
    if kind == "channel":
        means = scores.mean(1 - int(rest)).tolist()
        kept = torch.tensor(best(means, round(len(means) * (1 - sparsity))))
        return (kept[:, None] if rest == "0" else kept[None, :]).expand(rows, columns)
    height, width = map(int, rest.split(":")[0].split("x"))
    tiles = [scores[i : i + height, j : j + width] for i in range(0, rows, height) for j in range(0, columns, width)]
    values = [float(tile.max() if rest.endswith("max") else tile.mean()) for tile in tiles]
    kept = torch.tensor(best(values, round(len(values) * (1 - sparsity)))).view(rows // height, columns // width)
    return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "distinct"])
@pytest.mark.parametrize("text", PATTERNS)
def test_patterns_keep_what_their_definition_says(text: str, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, levels, (3, 8, 32), generator=generator).float()
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    sparsity = 0.7 if pattern.sparsity is None else pattern.sparsity
    mask = pattern.select(scores, sparsity)
    expected = torch.stack([slow_mask(text, matrix, sparsity) for matrix in scores])
    assert torch.equal(mask, expected)
    assert torch.equal(pattern.select(scores[1], sparsity), expected[1])
    assert pattern.fits(mask)
    flipped = mask.clone()
    flipped[0, 0, 0] ^= True
    assert pattern.fits(flipped) == (text == "unstructured" or text == "unstructured:row")


def test_infinite_scores_are_always_and_never_kept() -> None:
    scores = torch.tensor([[float("-inf"), 1.0, float("inf"), 0.0]])
    assert Pattern.parse("unstructured").select(scores, 0.75).tolist() == [[False, False, True, False]]
    assert Pattern.parse("unstructured").select(scores, 0.25).tolist() == [[False, True, True, True]]


def test_one_sparsity_for_each_matrix() -> None:
    mask = Pattern.parse("unstructured").select(torch.rand(3, 4, 8), [0.0, 0.5, 1.0])
    assert mask.sum((1, 2)).tolist() == [32, 16, 0]


def test_something_is_kept_of_every_matrix() -> None:
    assert int(Pattern.parse("unstructured").select(torch.rand(4, 8), 0.999).sum()) == 1


@pytest.mark.parametrize(
    "text", ["", "2:2", "0:4", "4", "block:4", "block:0x4", "channel:2", "Unstructured", "2:4 ", "2:99999"]
)
def test_unknown_patterns_are_refused(text: str) -> None:
    refused("E_VALUE", Pattern.parse, text)


def test_scores_are_checked() -> None:
    pattern, scores = Pattern.parse("2:4"), torch.rand(2, 4, 8)
    scores[1, 2, 3] = float("nan")
    assert "(1, 2, 3)" in refused("E_VALUE", pattern.select, scores).message
    assert "(2, 3)" in refused("E_VALUE", pattern.select, scores[1]).message
    refused("E_SHAPE", pattern.select, torch.rand(4, 6))
    refused("E_SHAPE", pattern.select, torch.rand(8))
    refused("E_SHAPE", pattern.select, torch.rand(0, 8))
    refused("E_SHAPE", Pattern.parse("block:4x4").select, torch.rand(6, 8), 0.5)
    refused("E_DTYPE", pattern.select, torch.ones(4, 8, dtype=torch.int64))
    refused("E_VALUE", pattern.select, torch.rand(4, 8), 0.25)
    unstructured = Pattern.parse("unstructured")
    refused("E_VALUE", unstructured.select, torch.rand(4, 8))
    refused("E_VALUE", unstructured.select, torch.rand(4, 8), 1.5)
    refused("E_SHAPE", unstructured.select, torch.rand(2, 4, 8), [0.5])


def test_candidates_come_in_the_order_of_maskllm() -> None:
    rows = ["".join(str(int(bit)) for bit in row) for row in NM(2, 4).candidates()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]
    refused("E_LIMIT", NM(16, 32).candidates)


def test_erk_keeps_what_uniform_keeps_and_matrices_whole_where_they_are_small() -> None:
    shapes = {"a": (64, 64), "b": (4, 256, 128), "c": (4, 8)}
    for sparsity in (0.3, 0.5, 0.9):
        shares = distribute(shapes, sparsity, "erk")
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        zeros = sum(shares[name] * sizes[name] for name in shapes)  # type: ignore[operator]
        assert zeros == pytest.approx(sparsity * sum(sizes.values()), abs=3)
        assert shares["c"] == 0.0
        a, b = 1 - shares["a"], 1 - shares["b"]  # type: ignore[operator]
        if shares["a"]:
            assert a / b == pytest.approx(((64 + 64) / (64 * 64)) / ((256 + 128) / (256 * 128)))


def test_global_keeps_the_highest_scores_of_all_tensors() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {name: torch.randint(-9, 9, shape, generator=generator).float() for name, shape in
              {"a": (6, 5), "b": (3, 4, 4), "c": (2, 2)}.items()}  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in scores.items()}
    pattern = Pattern.parse("unstructured")
    flat = torch.cat([value.flatten() for value in scores.values()]).tolist()
    for sparsity in (0.0, 0.4, 0.77, 0.99):
        shares = distribute(shapes, sparsity, "global", scores)
        found = torch.cat([pattern.select(scores[name], shares[name]).flatten() for name in scores])
        assert found.tolist() == best(flat, max(1, round(len(flat) * (1 - sparsity))))
    refused("E_MISSING", distribute, shapes, 0.5, "global")
    refused("E_SHAPE", distribute, shapes, 0.5, "global", {**scores, "c": scores["a"]})
    refused("E_VALUE", distribute, shapes, 0.5, "elsewhere")
    refused("E_VALUE", distribute, shapes, -0.1)
    refused("E_SHAPE", distribute, {"a": (3,)}, 0.5)


def test_kth_largest_is_exact_without_sorting() -> None:
    generator = torch.Generator().manual_seed(2)
    numbers = torch.cat(
        [torch.randn(997, generator=generator), torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), float("-inf")])]
    )
    ordered = numbers.sort(descending=True).values.tolist()
    for k in (1, 2, 17, 500, 501, 502, 503, 1003):
        assert kth_largest(lambda: numbers.split(100), k) == ordered[k - 1]
    refused("E_VALUE", kth_largest, lambda: [numbers], 1004)
    refused("E_VALUE", kth_largest, lambda: [torch.tensor([float("nan")])], 1)


def example() -> Masks:
    generator = torch.Generator().manual_seed(3)
    texts = {"a": "2:4", "b.experts": "1:4", "c": "unstructured", "d": "4:8", "e": "2:4", "f": "16:32"}
    patterns = {name: Pattern.parse(text) for name, text in texts.items()}
    shapes = {"a": (5, 28), "b.experts": (3, 5, 12), "c": (7, 9), "d": (2, 3, 16), "e": (3, 7, 20), "f": (2, 64)}
    masks = {name: patterns[name].select(torch.rand(shape, generator=generator), None if name != "c" else 0.3)
             for name, shape in shapes.items()}  # fmt: skip
    masks["e"][1, 2, 3] ^= True  # no 2:4 any more: in bits then
    return Masks(masks, patterns, ["b.experts"])


def same(first: Masks, second: Masks) -> bool:
    return (
        list(first) == list(second)
        and all(torch.equal(first[name], second[name]) for name in first)
        and first.patterns == second.patterns
        and first.transposed == second.transposed
    )


def test_masks_come_back_from_their_file(tmp_path: Path) -> None:
    masks = example()
    masks.save(tmp_path / "masks.safetensors")
    assert same(masks, Masks.load(tmp_path / "masks.safetensors"))
    with MaskFile(tmp_path / "masks.safetensors") as file:
        assert {name: info.coding for name, info in file.infos.items()} == {
            "a": "digits", "b.experts": "digits", "c": "bits", "d": "bits", "e": "bits", "f": "bits"
        }  # fmt: skip
        for name, expert in itertools.product(("b.experts", "d", "e"), range(2)):
            assert torch.equal(file.read(name, expert), masks[name][expert])
        refused("E_VALUE", file.read, "b.experts", 3)
        refused("E_VALUE", file.read, "a", 0)
        refused("E_MISSING", file.read, "z")
    assert list(tmp_path.iterdir()) == [tmp_path / "masks.safetensors"]


def test_a_2_4_mask_takes_two_thirds_of_a_bit_per_weight() -> None:
    mask = Pattern.parse("2:4").select(torch.rand(4, 96, 128))
    entry = Masks({"w": mask}, Pattern.parse("2:4")).report()[0]
    assert entry.bits_per_weight == pytest.approx(2 / 3, abs=1e-3)
    assert (entry.zeros, entry.sparsity, entry.pattern) == (4 * 96 * 64, 0.5, "2:4")


def test_every_truncation_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    masks = Masks(
        {"a": Pattern.parse("2:4").select(torch.rand(3, 20)), "b": torch.rand(3, 5) > 0.5}, {"a": Pattern.parse("2:4")}
    )
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(QmoeError):
            Masks.load(path)
    unnoticed = 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        try:
            unnoticed += not same(Masks.load(path), masks)
        except QmoeError:
            continue
    # A name or the text of a pattern that became another sound one cannot be noticed; weights must be.
    assert unnoticed <= 4
    path.write_bytes(good[:-1] + bytes([good[-1] | 0x80]))  # behind the end of b
    refused("E_CHECKSUM", Masks.load, path)


def rewritten(path: Path, edit: object) -> None:
    """Changes the JSON that describes the masks."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header["__metadata__"])  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("E_SHAPE", {"shape": [5, 32]}),
        ("E_CORRUPT", {"shape": [5]}),
        ("E_CORRUPT", {"shape": [5, -28]}),
        ("E_CORRUPT", {"shape": [5, 28.0]}),
        ("E_CORRUPT", {"shape": "5"}),
        ("E_CORRUPT", {"pattern": "2:5"}),
        ("E_CORRUPT", {"pattern": "3:2"}),
        ("E_CORRUPT", {"coding": "zip"}),
        ("E_CORRUPT", {"crc32c": "0"}),
        ("E_CORRUPT", {"transposed": 1}),
        ("E_CHECKSUM", {"crc32c": 1}),
    ],
)
def test_descriptions_that_lie_are_refused(tmp_path: Path, code: str, changes: dict[str, object]) -> None:
    path = tmp_path / "masks.safetensors"
    example().save(path)

    def edit(metadata: dict[str, str]) -> None:
        masks = json.loads(metadata["masks"])
        masks["a"] |= changes
        metadata["masks"] = json.dumps(masks)

    rewritten(path, edit)
    assert refused(code, Masks.load, path).file == str(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    refused("E_MISSING", Masks.load, path)
    for code, edit in {
        "E_CORRUPT": lambda metadata: metadata.update(format="pt"),
        "E_VERSION": lambda metadata: metadata.update(version="2"),
        "E_MISSING": lambda metadata: metadata.update(masks=metadata["masks"].replace('"a":', '"z":{},"a":')),
    }.items():
        example().save(path)
        rewritten(path, edit)
        refused(code, Masks.load, path)
    for text in ("[", "[]", "1", '{"a": 1}', "[" * 100000):
        example().save(path)
        rewritten(path, lambda metadata, text=text: metadata.update(masks=text))
        refused("E_CORRUPT", Masks.load, path)


def test_a_byte_that_is_no_three_groups_is_refused() -> None:
    from qmoe_core.sparsify.coding import digits_of

    digits = digits_of(NM(2, 4))
    assert digits is not None
    assert digits.decode(np.array([215], dtype=np.uint8), 12).tolist() == [False, False, True, True] * 3
    refused("E_CORRUPT", digits.decode, np.array([216], dtype=np.uint8), 12)
    refused("E_CORRUPT", digits.decode, np.array([6], dtype=np.uint8), 4)  # a second digit where there is one group


def test_masks_go_to_numpy_and_back(tmp_path: Path) -> None:
    masks = example()
    masks.to_npz(tmp_path / "masks.npz")
    assert same(masks, Masks.from_npz(tmp_path / "masks.npz"))
    with np.load(tmp_path / "masks.npz") as archive:
        assert np.array_equal(archive["a"], masks["a"].numpy())
    np.savez(tmp_path / "plain.npz", a=np.eye(3, dtype=np.uint8))
    assert torch.equal(Masks.from_npz(tmp_path / "plain.npz")["a"], torch.eye(3, dtype=torch.bool))
    for code, array in {
        "E_VALUE": np.full((2, 2), 2),
        "E_DTYPE": np.ones((2, 2)),
        "E_SHAPE": np.ones(2, dtype=bool),
    }.items():
        np.savez(tmp_path / "plain.npz", a=array)
        refused(code, Masks.from_npz, tmp_path / "plain.npz")
    good = (tmp_path / "masks.npz").read_bytes()
    for length in range(0, len(good), 7):
        (tmp_path / "cut.npz").write_bytes(good[:length])
        refused("E_CORRUPT", Masks.from_npz, tmp_path / "cut.npz")
    refused("E_MISSING", Masks.from_npz, tmp_path / "absent.npz")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    refused("E_CORRUPT", Masks.from_npz, tmp_path / "pickled.npz")


def test_applying_zeroes_whatever_was_there() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.full((2, 4, 3), float("nan")))  # (E, K, N)
            self.head = nn.Linear(4, 3)

    model = Experts()
    mask = torch.rand(2, 3, 4) > 0.5
    masks = Masks({"down_proj": mask, "head.weight": torch.zeros(3, 4, dtype=torch.bool)}, transposed=["down_proj"])
    masks.apply(model)
    assert torch.equal(model.down_proj.isnan(), mask.mT)
    assert bool((model.head.weight == 0).all())
    state = {"down_proj": torch.ones(2, 4, 3), "head.weight": torch.ones(3, 4, dtype=torch.bfloat16)}
    masks.apply(state)
    assert torch.equal(state["down_proj"] != 0, mask.mT)
    assert masks.sparsity() == pytest.approx((24 - int(mask.sum()) + 12) / 36)
    before = model.head.weight.clone()
    refused("E_MISSING", Masks({"head.weight": mask[0], "other": mask}).apply, model)
    refused("E_SHAPE", Masks({"head.weight": mask[0], "down_proj": mask}).apply, model)
    assert torch.equal(before, model.head.weight)


def test_masks_are_checked() -> None:
    refused("E_DTYPE", Masks, {"a": torch.ones(2, 2)})
    assert refused("E_SHAPE", Masks, {"a": torch.ones(2, dtype=torch.bool)}).tensor == "a"
    refused("E_MISSING", Masks, {}, {"a": Pattern.parse("2:4")})
    masks = Masks({"a": torch.ones(2, 4, dtype=torch.bool)}, Pattern.parse("2:4"))
    refused("E_VALUE", masks.check)
    assert Masks({}).sparsity() == 0.0


def test_every_public_class_has_an_example_that_runs() -> None:
    classes = [value for value in (getattr(sparsify, name) for name in sparsify.__all__) if isinstance(value, type)]
    assert classes and all(">>>" in str(value.__doc__) for value in classes)
    for name in sorted({value.__module__ for value in classes}):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("piece", [1 << 24, 24])
def test_masks_are_coded_part_by_part(monkeypatch, pattern, piece):
    """Parts that end anywhere give the bytes of the whole; memory is bounded by a part, not by a stack of experts."""
    monkeypatch.setattr(coding, "PIECE", piece)
    parsed = Pattern.parse(pattern)
    scores = torch.rand(5, 3, 16, generator=torch.Generator().manual_seed(1))
    mask = parsed.select(scores, None if ":" in pattern else 0.4)
    flat = mask.reshape(-1).numpy()
    digits = coding.digits_of(parsed)
    whole = np.packbits(flat, bitorder="little") if digits is None else digits.encode(flat)
    for size in (1, 5, 16, 48, 240):
        parts = [flat[i : i + size] for i in range(0, flat.size, size)]
        assert np.array_equal(coding.encode(parts, digits), whole)
    encoded = EncodedMask.of("w", mask, parsed)
    assert np.array_equal(encoded.data, whole) and encoded.info.shape == (5, 3, 16)
