"""The performance model: what a kernel costs per line of packed codes, and the tile that costs least.

A kernel that reads packed lines is bound by what memory delivers as long as it spends fewer cycles on a line than a
line takes to arrive: at 14 GB/s and 3 GHz that is 13 cycles, at 25 GB/s 7. So the model counts cycles per line:
instructions of each kind by their throughput, all of them by the issue width, and what does not fit into registers as a
store and a load. Several panels at a time share the broadcast activations; the model takes the largest tile among the
cheapest.

`python -m codegen.model` (from cpp/) prints the table of choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from codegen.isa import ISAS, Isa

UNIT_PANELS = 4
CHUNK = 128  # columns; the model's standard case
CODES = ("int2", "int3", "int4", "int8", "trits")
WIDTH = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "trits": 2}
STEP_QUADS = {"int2": 4, "int3": 8, "int4": 2, "int8": 1, "trits": 4}
STEP_LINES = {"int2": 1, "int3": 3, "int4": 1, "int8": 1, "trits": 1}


@dataclass(frozen=True)
class Direct:
    """Tile of a kernel that reads packed lines: `panels` at a time, and `spread` accumulators per panel and token.

    With a spread of s, s neighbouring codes of a byte stay where they are and are summed apart, each sum being
    2^position times too large until it is shifted once per chunk; that saves shifting every line.
    """

    panels: int
    spread: int


@dataclass(frozen=True)
class Tile:
    """Tile of a kernel that reads unpacked codes."""

    panels: int
    tokens: int


def spreads(isa: Isa, codes: str) -> list[int]:
    """The spreads that `isa`'s dot product can take: the shifted codes must not saturate it."""
    if codes == "int3":
        return [1, 3] if isa.largest_code >= 7 << 5 else [1]
    width = WIDTH[codes]
    return [
        s
        for s in (1, 2, 4)
        if s * width <= 8 and (s == 1 or ((1 << width) - 1) << (width * (s - 1)) <= isa.largest_code)
    ]


def accumulators(codes: str, spread: int) -> int:
    """Sums per panel and token: trits have one for each level."""
    return spread * (2 if codes == "trits" else 1)


def vector_cycles(isa: Isa, simple: float, dots: float, floats: float) -> float:
    """Cycles of the vector units. Simple instructions run on every port, products on some: those may be the limit, or
    all together."""
    everything = (simple + dots * isa.dot_instructions + floats) * isa.simple
    return max(dots * isa.dot + floats * isa.convert, everything)


def direct_cycles(isa: Isa, codes: str, tokens: int, tile: Direct) -> float:
    """Cycles per line of packed codes."""
    quads, lines, parts = STEP_QUADS[codes], STEP_LINES[codes], isa.parts
    if (
        codes == "int3"
    ):  # 8 masks; two codes are put together from two lines; without a spread everything is shifted down
        logic, shifts = 8 + 2, 3 + (0 if tile.spread == 3 else 5)
    else:
        groups = quads // tile.spread
        logic = 0 if codes == "int8" else quads * (2 if codes == "trits" else 1)
        shifts = groups - 1
    dots = quads * (2 if codes == "trits" else 1)
    steps = CHUNK / (4 * quads)
    sums = accumulators(codes, tile.spread)
    # Per panel and chunk: bring the spread sums together, convert, scale, correct, add, and clear the sums.
    flush_simple = parts * tokens * (2 * (sums - 1) + sums)
    flush_float = parts * (1 + tokens * (3 if codes != "trits" else 5))
    simple = parts * (logic + shifts) + flush_simple / steps
    live = parts * tile.panels * tokens * (sums + 1) + quads + 3
    spilled = max(0, live - isa.registers)
    # Lines, the prefetch of each, activations, and what is spilled.
    memory = parts * lines + lines + quads * tokens / tile.panels + 2 * spilled / steps
    if parts * tile.panels * tokens * sums + 4 > isa.registers:  # not even the sums fit: every product goes to memory
        memory += 2 * parts * dots * tokens
    dot_count = parts * dots * tokens
    vector = vector_cycles(isa, simple, dot_count, flush_float / steps)
    issued = simple + dot_count * isa.dot_instructions + flush_float / steps + memory + 3 / tile.panels
    return max(vector, memory * isa.load, issued / isa.issue) / lines


@lru_cache
def choose_direct(isa: Isa, codes: str, tokens: int) -> Direct:
    """The cheapest tile; among those within 3 % of it the one with the most panels."""
    if not isa.vector:
        return Direct(1, 1)
    tiles = [Direct(panels, spread) for panels in (1, 2, 4) for spread in spreads(isa, codes)]
    best = min(direct_cycles(isa, codes, tokens, tile) for tile in tiles)
    good = [tile for tile in tiles if direct_cycles(isa, codes, tokens, tile) <= 1.03 * best]
    return max(good, key=lambda tile: (tile.panels, tile.spread))


def tile_cycles(isa: Isa, trits: bool, tile: Tile) -> float:
    """Cycles per token and line of unpacked codes."""
    parts, factor = isa.parts, 2 if trits else 1
    cells = parts * tile.panels * tile.tokens
    sums = cells * factor
    if sums + parts * factor + 1 > isa.registers:
        return float("inf")
    quads = CHUNK // 4
    memory = parts * tile.panels + tile.tokens + 2 * cells / quads
    simple = (2 * parts * tile.panels if trits else 0) + sums / quads
    floats = (cells * (3 + 2 * (factor - 1)) + parts * tile.panels) / quads
    vector = vector_cycles(isa, simple, sums, floats)
    issued = memory + simple + sums * isa.dot_instructions + floats + 2
    return max(vector, memory * isa.load, issued / isa.issue) / (tile.panels * tile.tokens)


@lru_cache
def choose_tile(isa: Isa, trits: bool) -> Tile:
    """The cheapest tile of panels and tokens whose sums fit the registers; among those within 3 % of it the one with
    the most panels: with few tokens left over, many panels still are many independent sums."""
    if not isa.vector:
        return Tile(1, 1)
    tiles = [Tile(panels, tokens) for panels in (1, 2, 4) for tokens in range(1, 13)]
    fitting = [tile for tile in tiles if tile_cycles(isa, trits, tile) < float("inf")]
    best = min(tile_cycles(isa, trits, tile) for tile in fitting)
    good = [tile for tile in fitting if tile_cycles(isa, trits, tile) <= 1.03 * best]
    return max(good, key=lambda tile: (tile.panels, tile.tokens))


def main() -> None:
    for isa in ISAS.values():
        for codes in CODES:
            for tokens in (1, 2, 4):
                tile = choose_direct(isa, codes, tokens)
                cycles = direct_cycles(isa, codes, tokens, tile)
                print(f"{isa.name:11} {codes:6} {tokens} tokens: {tile}, {cycles:.1f} cycles a line")
        for trits in (False, True):
            best = choose_tile(isa, trits)
            kind, cycles = "trits" if trits else "codes", tile_cycles(isa, trits, best)
            print(f"{isa.name:11} unpacked {kind}: {best}, {cycles:.2f} cycles a token and line")


if __name__ == "__main__":
    main()
