"""Run-time layouts: when they are made, how long they live, and what happens when the record changes."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from packed_fixtures import pack

from qmoe_core import _C
from qmoe_core.errors import QmoeError
from qmoe_core.runtime import layouts, ops
from qmoe_core.runtime.gating import Gating


def packed_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(pack(weight).data)


@pytest.fixture
def made(monkeypatch):
    """Counts layouts that are made."""
    calls: list[str] = []
    make = layouts._make
    monkeypatch.setattr(layouts, "_make", lambda packed, order: calls.append(order) or make(packed, order))
    return calls


def test_a_layout_is_made_once_and_goes_with_its_record(made):
    packed = packed_of(torch.randn(2, 32, 40))
    before = len(layouts._layouts)
    x = torch.randn(3, 40)
    for _ in range(3):
        ops.grouped_linear(x, packed, torch.tensor([0, 1, 3]), 32)
    view = packed.view(-1)
    ops.grouped_linear(x, view, torch.tensor([0, 1, 3]), 32)
    assert made == ["plain"] and len(layouts._layouts) == before + 1
    del packed, view
    gc.collect()
    assert len(layouts._layouts) == before


def test_a_record_that_changes_in_place_gets_a_new_layout(made):
    first, second = packed_of(torch.randn(1, 16, 64)), packed_of(torch.randn(1, 16, 64))
    x = torch.randn(2, 64)
    packed = first.clone()
    assert torch.equal(ops.linear(x, packed, 16), ops.linear(x, first, 16))
    packed.copy_(second)
    assert torch.equal(ops.linear(x, packed, 16), ops.linear(x, second, 16))
    assert len(made) == 4


def test_stored_makes_none(made):
    packed = packed_of(torch.randn(1, 16, 64))
    x = torch.randn(2, 64)
    stored = ops.linear(x, packed, 16, "stored")
    assert not made
    torch.testing.assert_close(stored, ops.linear(x, packed, 16, "float"), rtol=1e-5, atol=1e-5)


def test_records_of_inference_mode(made):
    with torch.inference_mode():
        packed = packed_of(torch.randn(1, 16, 64)).clone()
        x = torch.randn(2, 64)
        assert torch.equal(ops.linear(x, packed, 16), ops.linear(x, packed, 16))
    assert len(made) == 1


def test_layouts_are_as_small_as_records():
    for bits, columns in itertools.product((2, 3, 4, 8), (128, 768)):
        packed = torch.from_numpy(pack(torch.randn(4, 64, columns), bits=bits, group=128).data)
        assert _C.prepack_size(packed.data_ptr(), packed.numel(), "plain") <= 1.1 * packed.numel() + 1024


def test_refusals():
    packed = packed_of(torch.randn(2, 32, 40))
    x = torch.randn(1, 40)
    with pytest.raises(QmoeError, match="E_VALUE"):
        ops.linear(x, packed_of(torch.randn(1, 32, 40)), 32, "int4")
    ids, weights = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    down = packed_of(torch.randn(2, 40, 16))
    with pytest.raises(QmoeError, match="E_DTYPE"):
        ops.experts(x, ids.int(), weights, packed, down, Gating("halves"))
    with pytest.raises(QmoeError, match="E_SHAPE"):
        ops.experts(x, ids, weights[:, :1], packed, down, Gating("halves"))
    with pytest.raises(QmoeError, match="E_SHAPE"):
        ops.experts(x, ids, weights, packed, packed_of(torch.randn(2, 40, 8)), Gating("halves"))
    with pytest.raises(QmoeError, match="E_VALUE"):
        ops.experts(x, ids, weights, packed, down, Gating("halves"), compute="stored")
    assert ops.experts(x, ids, weights, packed, down, Gating("halves")).shape == (1, 40)


@pytest.mark.parametrize("which", ["first_bias", "second_bias"])
def test_biases_that_do_not_fit_are_refused(which):
    # The kernels index biases by the records' experts and rows alone: anything smaller would be read beyond its end.
    packed, down = packed_of(torch.randn(2, 32, 40)), packed_of(torch.randn(2, 40, 16))
    x, ids, weights = torch.randn(3, 40), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)
    rows = {"first_bias": 32, "second_bias": 40}[which]
    for shape in ((1, rows), (3, rows), (2, rows - 1), (2, rows + 1), (rows, 2), (2 * rows,), (0,)):
        with pytest.raises(QmoeError, match="E_SHAPE") as refused:
            ops.experts(x, ids, weights, packed, down, Gating("halves"), **{which: torch.zeros(shape)})
        assert (refused.value.expected, refused.value.actual) == ((2, rows), shape)
    zero = ops.experts(x, ids, weights, packed, down, Gating("halves"), **{which: torch.zeros(2, rows)})
    torch.testing.assert_close(zero, ops.experts(x, ids, weights, packed, down, Gating("halves")))
