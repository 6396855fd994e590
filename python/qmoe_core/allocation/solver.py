"""Choosing one candidate per item, of the least total loss, within a budget of bytes: the multiple-choice knapsack.

1. The linear relaxation is solved exactly (Sinha & Zoltners, "The multiple-choice knapsack problem", Operations
   Research 27, 1979): only the lower convex hull of each item's (bytes, loss) points matters; walking all hulls
   together, steepest decrease per byte first, until the budget is spent, is optimal. The slope where it stops is the
   price of a byte, and for any price p >= 0

       bound(p) = sum over items of min over candidates (loss + p bytes)  -  p budget

   is no more than the loss of any choice within the budget: the certificate, which anyone can recompute.
2. What whole candidates leave of the budget is filled greedily.
3. The gap between 2 and the bound is searched. At the price p, a candidate whose reduced cost (how far it is above its
   item's minimum of loss + p bytes) exceeds the gap cannot be part of a better choice, so few candidates of few items
   (the core) remain; dynamic programming over their Pareto-optimal (bytes, loss) states finds the best one (as in
   Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995). Where neither core nor
   states hit their limits the result is proven optimal; else the bound says how far off it can be.

Everything is deterministic; ties go to fewer bytes, then to the earlier candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QmoeError
from .problem import Item, Tables

# Limits of the search: items whose choice is left open, and states kept after each of them.
CORE_ITEMS = 400
STATES = 4096
# Relative accuracy that comparisons of sums of float64 losses are given.
ACCURACY = 1e-12


@dataclass(frozen=True)
class Allocation:
    """A choice and how good it is known to be.

    Attributes:
        choice: per item the number of its candidate. `nbytes`, `loss`: their totals. `budget`: what was allowed.
        bound: no choice within the budget has a smaller loss than this.
        price: the price of a byte that proves the bound (see the module's docstring).
        optimal: the search proved that no choice is better (up to rounding of the sums).
    """

    choice: tuple[int, ...]
    nbytes: int
    loss: float
    budget: int
    bound: float
    price: float
    optimal: bool

    @property
    def gap(self) -> float:
        """How much smaller the loss of the best choice could be, at most; 0 where this one is known to be the best."""
        return 0.0 if self.optimal else max(0.0, self.loss - self.bound)

    def to_dict(self) -> dict[str, Any]:
        """The totals and the certificate, without the choice."""
        names = ("nbytes", "loss", "budget", "bound", "price", "optimal", "gap")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Steps:
    """All moves along the lower hulls, steepest first.

    Attributes:
        start: (n,) the smallest candidate of each item, where the walk begins.
        item, candidate: (s,) which item moves to which candidate.
        nbytes, gain: (s,) bytes added and loss removed; gain / nbytes does not increase.
    """

    start: np.ndarray
    item: np.ndarray
    candidate: np.ndarray
    nbytes: np.ndarray
    gain: np.ndarray


def hull_steps(tables: Tables) -> Steps:
    """The lower hulls of all items and their moves in order."""
    rows = np.arange(len(tables.nbytes))
    # The smallest size, of those the smallest loss.
    smallest = tables.nbytes.min(axis=1, keepdims=True)
    current = np.where(tables.nbytes == smallest, tables.loss, np.inf).argmin(axis=1)
    start = current.copy()
    parts = []
    while len(rows):
        at_bytes, at_loss = tables.nbytes[rows, current, None], tables.loss[rows, current, None]
        more, less = tables.nbytes[rows] - at_bytes, at_loss - tables.loss[rows]
        useful = (more > 0) & (less > 0)
        slope = np.where(useful, less / np.maximum(more, 1), -1.0)
        best = slope.max(axis=1)
        # Of equally steep ones the nearest: smaller steps fit a budget better.
        nearest = np.where(slope == best[:, None], more, np.iinfo(np.int64).max).argmin(axis=1)
        moves = best > 0
        rows, current, picked = rows[moves], nearest[moves], np.flatnonzero(moves)
        parts.append((rows, current, more[picked, current], less[picked, current]))
    item, candidate, nbytes, gain = (np.concatenate([part[i] for part in parts]) for i in range(4))
    # Rounding must not put an item's second move before its first: slopes are made non-increasing within an item.
    slope = gain / nbytes
    last = np.full(len(tables.nbytes), np.inf)
    first = 0
    for part in parts:
        span = slice(first, first + len(part[0]))
        slope[span] = last[part[0]] = np.minimum(slope[span], last[part[0]])
        first = span.stop
    order = np.argsort(-slope, kind="stable")
    return Steps(start, item[order], candidate[order], nbytes[order], gain[order])


def solve(items: Sequence[Item], budget: int) -> Allocation:
    """The best choice of one candidate per item whose bytes add up to `budget` at most.

    Raises:
        QmoeError: `E_VALUE` where even the smallest candidates exceed the budget, naming their total; or for sizes and
            losses that are none.
    """
    tables = Tables.of(items)
    return solve_tables(tables, budget)


def solve_tables(tables: Tables, budget: int) -> Allocation:
    """`solve` for candidates given as arrays."""
    if len(tables.nbytes) == 0:
        return Allocation((), 0, 0.0, budget, 0.0, 0.0, True)
    smallest = int(tables.nbytes.min(axis=1).sum())
    if smallest > budget:
        raise QmoeError(
            "E_VALUE", "allocation: the budget is below the smallest possible size", expected=f">= {smallest} bytes",
            actual=budget,
        )  # fmt: skip
    steps = hull_steps(tables)
    choice, price = _greedy(tables, steps, budget, smallest)
    reduced = tables.loss + price * tables.nbytes
    floor = reduced.min(axis=1)
    bound = float(floor.sum()) - price * budget
    rows = np.arange(len(choice))
    loss = float(tables.loss[rows, choice].sum())
    tolerance = ACCURACY * (float(np.abs(floor).sum()) + price * budget)
    optimal = loss - bound <= tolerance
    if not optimal:
        reduced -= floor[:, None]
        better, optimal = _search(tables, reduced, budget, loss - bound, choice)
        if better is not None:
            choice = better
    return Allocation(
        tuple(choice.tolist()),
        int(tables.nbytes[rows, choice].sum()),
        float(tables.loss[rows, choice].sum()),
        budget,
        bound,
        price,
        bool(optimal),
    )


def _greedy(tables: Tables, steps: Steps, budget: int, smallest: int) -> tuple[np.ndarray, float]:
    """(choice, price of a byte): the walk along the hulls, then every later move that still fits."""
    choice = steps.start.copy()
    spent = smallest + np.cumsum(steps.nbytes)
    taken = int(np.searchsorted(spent, budget, side="right"))
    # A later move of an item overwrites its earlier ones; numpy assigns in order.
    choice[steps.item[:taken]] = steps.candidate[:taken]
    if taken == len(steps.item):
        return choice, 0.0
    price = float(steps.gain[taken] / steps.nbytes[taken])
    left = budget - (int(spent[taken - 1]) if taken else smallest)
    # Moves from an item's present candidate; those after a move that did not fit are reached by a jump.
    rows = np.arange(len(choice))
    while True:
        more = tables.nbytes[steps.item[taken:], steps.candidate[taken:]]
        more = more - tables.nbytes[rows, choice][steps.item[taken:]]
        gain = tables.loss[rows, choice][steps.item[taken:]]
        gain = gain - tables.loss[steps.item[taken:], steps.candidate[taken:]]
        fits = np.flatnonzero((more <= left) & (gain > 0))
        if not len(fits):
            return choice, price
        # Of different items, in order, as many as fit together.
        unique = np.sort(np.unique(steps.item[taken:][fits], return_index=True)[1])
        fits = fits[unique]
        count = max(1, int(np.searchsorted(np.cumsum(more[fits]), left, side="right")))
        chosen = fits[:count]
        choice[steps.item[taken:][chosen]] = steps.candidate[taken:][chosen]
        left -= int(more[chosen].sum())


def _search(
    tables: Tables, reduced: np.ndarray, budget: int, gap: float, incumbent: np.ndarray
) -> tuple[np.ndarray | None, bool]:
    """(a better choice or None, whether nothing better than the result exists).

    A choice's loss is the bound + the sum of its reduced costs + price x bytes left over; so any choice better than the
    incumbent has reduced costs that sum to less than `gap`.
    """
    rows = np.arange(len(incumbent))
    base = np.where(reduced == 0, tables.nbytes, np.iinfo(np.int64).max).argmin(axis=1)
    open_ = reduced < gap
    counts = open_.sum(axis=1)
    core = np.flatnonzero(counts > 1)
    complete = len(core) <= CORE_ITEMS
    # The cheapest alternatives first: they matter most, and the states grow slowly.
    cheapest = np.where(np.arange(reduced.shape[1]) == base[core, None], np.inf, reduced[core]).min(axis=1)
    core = core[np.argsort(cheapest, kind="stable")[:CORE_ITEMS]]
    closed = np.ones(len(incumbent), dtype=bool)
    closed[core] = False
    fixed_bytes = int(tables.nbytes[rows, base][closed].sum())
    # The least that the items still to come take, to drop states that cannot fit any more.
    least = np.where(open_[core], tables.nbytes[core], np.iinfo(np.int64).max).min(axis=1)
    to_come = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0]]) if len(core) else np.zeros(0, dtype=np.int64)

    if fixed_bytes + int(least.sum()) > budget:
        return None, complete  # all that could be better than the incumbent is too large
    state_bytes, state_loss = (
        np.array([fixed_bytes], dtype=np.int64),
        np.array([float(tables.loss[rows, base][closed].sum())]),
    )
    state_cost = np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for place, item in enumerate(core):
        options = np.flatnonzero(open_[item])
        nbytes = (state_bytes[:, None] + tables.nbytes[item, options]).ravel()
        loss = (state_loss[:, None] + tables.loss[item, options]).ravel()
        cost = (state_cost[:, None] + reduced[item, options]).ravel()
        keep = np.flatnonzero((nbytes + to_come[place] <= budget) & (cost < gap))
        if not len(keep):
            return None, complete
        order = keep[np.lexsort((loss[keep], nbytes[keep]))]
        # Pareto: with bytes increasing, only a loss below all before it is of use.
        before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
        order = order[loss[order] < before]
        if len(order) > STATES:
            complete = False
            order = order[_cheapest(cost[order])]
        history.append((order // len(options), options[order % len(options)]))
        state_bytes, state_loss, state_cost = nbytes[order], loss[order], cost[order]
    best = int(state_loss.argmin())
    if state_loss[best] >= float(tables.loss[rows, incumbent].sum()):
        return None, complete
    choice = base.copy()
    for place in range(len(core) - 1, -1, -1):
        parents, options = history[place]
        choice[core[place]] = options[best]
        best = int(parents[best])
    return choice, complete


def _cheapest(cost: np.ndarray) -> np.ndarray:
    """Places of the `STATES` cheapest states, in their order."""
    return np.sort(np.argsort(cost, kind="stable")[:STATES])
