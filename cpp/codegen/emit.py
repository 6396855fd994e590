"""Writes the kernels of one instruction set as C++: straight-line tiles of the primitives in cpp/src/cpu/isa/."""

from __future__ import annotations

from collections.abc import Iterator

from codegen.isa import Isa
from codegen.model import (
    CODES,
    STEP_LINES,
    STEP_QUADS,
    UNIT_PANELS,
    WIDTH,
    Direct,
    Tile,
    accumulators,
    choose_direct,
    choose_tile,
    direct_cycles,
    tile_cycles,
)  # fmt: skip

ZEROS, SCALES = ("constant", "stored"), ("f16", "f32")
DIRECT_TOKENS = (1, 2, 4)


class Source:
    """Lines of C++ with their indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, line: str = "") -> None:
        if line.startswith("}"):
            self.depth -= 1
        self.lines.append("    " * self.depth + line if line else "")
        if line.endswith("{"):
            self.depth += 1


def shifted(value: str, bits: int, masked: int | None = None) -> str:
    """`value` shifted right by `bits`, then masked."""
    result = value if bits == 0 else f"shift_right<{bits}>({value})"
    return result if masked is None else f"mask<{masked:#04x}>({result})"


def codes_of_lines(codes: str, spread: int) -> Iterator[tuple[str, int, int]]:
    """The quads of one step in order: expression over the lines {0}, {1}, {2}, the quad, and which sum takes it."""
    if codes == "int3":
        # See the diagram in panels.h. Codes stand at bit 0, 3 or 5 of their byte.
        split = ("select<0x60>(shift_right<1>({0}), shift_left<1>({2}))", "select<0x60>(shift_right<1>({1}), {2})")
        for quad in range(8):
            position = quad % 2 if quad < 6 else 2
            base = f"{{{quad // 2}}}" if quad < 6 else split[quad - 6]
            bit = (0, 3, 5)[position]
            if spread == 3:
                yield f"mask<{7 << bit:#04x}>({base})", quad, position
            else:
                yield shifted(base, bit, 7), quad, 0
        return
    width = WIDTH[codes]
    for quad in range(STEP_QUADS[codes]):
        position = quad % spread
        bits = (quad - position) * width
        field = ((1 << width) - 1) << (position * width)
        yield ("{0}" if width == 8 else shifted("{0}", bits, field)), quad, position


def sum_shift(codes: str, position: int) -> int:
    """By how many bits the sum at `position` is too large."""
    return (0, 3, 5)[position] if codes == "int3" else position * WIDTH[codes]


def scale_load(scales: str, pointer: str, part: int, isa: Isa) -> str:
    lanes = isa.width // 4
    if scales == "f16":
        return f"load_half({pointer} + {part * lanes * 2})"
    return f"load_floats(reinterpret_cast<const float*>({pointer}) + {part * lanes})"


def dot_of(codes: str) -> str:
    return "dot_wide" if codes == "int8" else "dot"


def emit_flush(out: Source, isa: Isa, trits: bool, zeros: str, scales: str, panels: int, tokens: int,
               sums: dict[tuple[int, int, int], list[str]], in_memory: bool) -> None:  # fmt: skip
    """Sums of a chunk to floats: total += scale * ((sum - zero * sum of activations) * activation scale + correction).
    With "constant" zeros nothing is subtracted: sums may have begun with that.

    `sums` maps (panel, token, part) to one expression, or for trits to those of high and low. Totals are registers, or
    lie in y where sums fill the registers: compilers would otherwise store the sums in the innermost loop."""
    lanes = isa.width // 4
    for p in range(panels):
        for r in range(isa.parts):
            if trits:
                out(f"const Floats high{p}_{r} = {scale_load('f32', f's{p}', r, isa)};")
                out(f"const Floats low{p}_{r} = {scale_load('f32', f's{p} + 64', r, isa)};")
            else:
                out(f"const Floats scale{p}_{r} = {scale_load(scales, f's{p}', r, isa)};")
            if zeros == "stored":
                out(f"const Sums zero{p}_{r} = load_zeros(z{p} + {r * lanes});")
    for t in range(tokens):
        out("{")
        out(f"const ActivationChunk& shared = x.chunks[{t} * x.chunk_stride + chunk];")
        out("const Floats factor = splat(&shared.scale);")
        if not trits:
            out("const Floats correction = splat(&shared.correction);")
        if zeros == "stored":
            out("const Sums negative = splat_sum(&shared.negative_sum);")
        for p in range(panels):
            for r in range(isa.parts):
                parts = sums[p, t, r]
                total = f"total{p}_{t}_{r}"
                at = f"y + {t} * y_stride + (panel + {p}) * kPanelRows + {r * lanes}"
                before = f"load_floats({at})" if in_memory else total
                if trits:
                    high, low = parts
                    value = f"fma(mul(to_floats({high}), factor), high{p}_{r}, {before})"
                    value = f"fma(mul(to_floats({low}), factor), low{p}_{r}, {value})"
                else:
                    whole = f"add_product({parts[0]}, zero{p}_{r}, negative)" if zeros == "stored" else parts[0]
                    value = f"fma(to_floats({whole}), factor, correction)"
                    value = f"fma({value}, scale{p}_{r}, {before})"
                out(f"store_floats({at}, {value});" if in_memory else f"{total} = {value};")
        out("}")


def emit_negative_sums(out: Source, zeros: str, tokens: int) -> None:
    for t in range(tokens if zeros == "stored" else 0):
        out(f"const Sums negative{t} = splat_sum(&x.chunks[{t} * x.chunk_stride + chunk].negative_sum);")


def first_sum(isa: Isa, zeros: str, panel: int, token: int, part: int) -> str:
    """What the sum begins with whose products are not too large by any factor: minus the zeros' share. That is an
    instruction less than subtracting it at the end, where there are registers for the zeros of all panels."""
    return f"zeros_times(z{panel} + {part * isa.width // 4}, negative{token})" if zeros == "stored" else "zero_sums()"


def emit_totals(out: Source, isa: Isa, panels: int, tokens: int, in_memory: bool) -> None:
    for p, t, r in cells(isa, panels, tokens):
        if in_memory:
            out(f"store_floats(y + {t} * y_stride + (panel + {p}) * kPanelRows + {r * isa.width // 4}, zero_floats());")
        else:
            out(f"Floats total{p}_{t}_{r} = zero_floats();")


def emit_results(out: Source, isa: Isa, panels: int, tokens: int) -> None:
    for p, t, r in cells(isa, panels, tokens):
        at = f"y + {t} * y_stride + (panel + {p}) * kPanelRows + {r * isa.width // 4}"
        out(f"store_floats({at}, total{p}_{t}_{r});")


def emit_pointers(out: Source, panels: int, zeros: str) -> None:
    for p in range(panels):
        out(f"const uint8_t* c{p} = unit.codes + (panel + {p}) * unit.codes_stride;")
        out(f"const uint8_t* s{p} = unit.scales + (panel + {p}) * unit.scales_stride;")
        if zeros == "stored":
            out(f"const uint8_t* z{p} = unit.zeros + (panel + {p}) * unit.zeros_stride;")


def emit_prefetch(out: Source, pointer: str, line: int) -> None:
    """Asks for what lies a line's two distances ahead. Where a processor wants only one of them the other is 0: a line
    that is asked for where it is read costs a slot of the load units, which have many to spare."""
    out(f"prefetch_far({pointer} + unit.far + {64 * line});")
    out(f"prefetch_near({pointer} + unit.near + {64 * line});")


def emit_advance(out: Source, panels: int, zeros: str, lines: int = 0) -> None:
    """To the next group at the end of one; `lines`: of scales and zeros that lie between the codes of two groups."""
    out("if (++within < unit.repeat) continue;")
    out("within = 0;")
    for line in range(lines):  # what the codes' own requests leave out
        emit_prefetch(out, "c0", line)
    for p in range(panels):
        if lines:
            out(f"c{p} += unit.gap;")
        out(f"s{p} += unit.scale_step;")
        if zeros == "stored":
            out(f"z{p} += unit.zero_step;")


def cells(isa: Isa, panels: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    return ((p, t, r) for p in range(panels) for t in range(tokens) for r in range(isa.parts))


def loads_first(isa: Isa, codes: str, tokens: int, tile: Direct) -> bool:
    """Whether a step loads the lines of its four panels before it uses any, which takes a register each: AVX-512 has
    them for one token and lines that make no others. What waits for memory fills the scheduler of the vector units, so
    loads that stand before it are those that overlap: 3 to 5 % more of the read limit with 2 bits."""
    sums = tile.panels * (accumulators(codes, tile.spread) + 1)
    needed = sums + tile.panels + 2 * STEP_QUADS[codes]
    fits = needed <= isa.registers and STEP_LINES[codes] == 1
    return fits and isa.vector and isa.parts == 1 and tokens == 1 and tile.panels == UNIT_PANELS


def emit_direct(out: Source, isa: Isa, codes: str, scales: str, zeros: str, tokens: int, tile: Direct) -> str:
    """A kernel from packed lines. Returns its name."""
    name = f"direct_{codes}_{scales}_{zeros}_{tokens}"
    trits, levels = codes == "trits", 2 if codes == "trits" else 1
    lines, quads, width = STEP_LINES[codes], STEP_QUADS[codes], isa.width
    if tokens > 1 and not isa.vector:
        out(f"void {name}(const UnitView& unit, const QuantizedView& x, float* y, uint64_t y_stride) noexcept {{")
        out("QuantizedView rest = x;")
        out(f"for (uint64_t left = {tokens}; left > 0;) {{")
        out(f"direct_{codes}_{scales}_{zeros}_1(unit, rest, y, y_stride);")
        out("advance(rest, y, left, 1, y_stride);")
        out("}")
        out("}")
        return name
    out(f"// {tile.panels} panels, {accumulators(codes, tile.spread)} sums each;"
        f" predicted: {direct_cycles(isa, codes, tokens, tile):.1f} cycles a line.")  # fmt: skip
    out(f"void {name}(const UnitView& unit, const QuantizedView& x, float* y, uint64_t y_stride) noexcept {{")
    out(f"for (uint32_t panel = 0; panel < kUnitPanels; panel += {tile.panels}) {{")
    emit_pointers(out, tile.panels, zeros)
    for t in range(tokens):
        out(f"const int8_t* x{t} = x.x + {t} * x.x_stride;")
    # Sums and totals of a tile, and what else the loop needs.
    in_memory = len(list(cells(isa, tile.panels, tokens))) * (accumulators(codes, tile.spread) + 1) + 8 > isa.registers
    emit_totals(out, isa, tile.panels, tokens, in_memory)
    out("uint32_t within = 0;")
    out("for (uint32_t chunk = 0; chunk < unit.chunks; ++chunk) {")
    emit_negative_sums(out, zeros, tokens)
    for p, t, r in cells(isa, tile.panels, tokens):
        for s in range(tile.spread):
            for level in range(levels):
                start = first_sum(isa, zeros, p, t, r) if s == 0 else "zero_sums()"
                out(f"Sums a{p}_{t}_{r}_{s}_{level} = {start};")
    out("const uint32_t steps = chunk + 1 == unit.chunks ? unit.last_steps : unit.steps;")
    out("for (uint32_t step = 0; step < steps; ++step) {")
    for t in range(tokens):
        for q in range(quads):
            out(f"const Bytes v{t}_{q} = splat_quad(x{t} + {4 * q});")
    hoisted = loads_first(isa, codes, tokens, tile)
    for p in range(tile.panels if hoisted else 0):
        emit_prefetch(out, f"c{p}", 0)
        out(f"Bytes l{p}_0_0 = load_bytes(c{p});")
    if hoisted:
        out("hold(l0_0_0, l1_0_0, l2_0_0, l3_0_0);")
    for p in range(tile.panels):
        for line in range(0 if hoisted else lines):
            emit_prefetch(out, f"c{p}", line)
        for r in range(isa.parts):
            for line in range(0 if hoisted else lines):
                out(f"const Bytes l{p}_{r}_{line} = load_bytes(c{p} + {64 * line + width * r});")
            names = [f"l{p}_{r}_{line}" for line in range(lines)]
            for expression, quad, position in codes_of_lines(codes, tile.spread):
                value = expression.format(*names)
                if trits:
                    inner = value[value.index("(") + 1 : -1]
                    values = [f"mask<{bit << (2 * position):#04x}>({inner})" for bit in (1, 2)]
                else:
                    values = [value]
                for level, operand in enumerate(values):
                    code = f"k{p}_{r}_{quad}_{level}"
                    out(f"const Bytes {code} = {operand};")
                    for t in range(tokens):
                        a = f"a{p}_{t}_{r}_{position}_{level}"
                        out(f"{a} = {dot_of(codes)}({a}, {code}, v{t}_{quad});")
        out(f"c{p} += {64 * lines * UNIT_PANELS};")
    for t in range(tokens):
        out(f"x{t} += {4 * quads};")
    out("}")
    sums: dict[tuple[int, int, int], list[str]] = {}
    for p, t, r in cells(isa, tile.panels, tokens):
        sums[p, t, r] = []
        for level in range(levels):
            expression = ""
            for position in range(tile.spread):
                bits = sum_shift(codes, position) + level
                a = f"a{p}_{t}_{r}_{position}_{level}"
                a = f"shift_sums<{bits}>({a})" if bits else a
                expression = a if not expression else f"add({expression}, {a})"
            sums[p, t, r].append(expression)
    emit_flush(out, isa, trits, "constant", scales, tile.panels, tokens, sums, in_memory)
    scale_bytes = 128 if trits else {"f16": 32, "f32": 64}[scales]
    emit_advance(out, tile.panels, zeros, UNIT_PANELS * (scale_bytes + (16 if zeros == "stored" else 0)) // 64)
    out("}")
    if not in_memory:
        emit_results(out, isa, tile.panels, tokens)
    out("}")
    out("}")
    return name


def emit_unpack(out: Source, isa: Isa, codes: str) -> str:
    """Packed lines to one code a byte. Returns the kernel's name."""
    name = f"unpack_{codes}"
    lines, quads = STEP_LINES[codes], STEP_QUADS[codes]
    out(f"void {name}(const uint8_t* lines, uint64_t steps, uint8_t* codes) noexcept {{")
    out("for (uint64_t step = 0; step < steps; ++step) {")
    for r in range(isa.parts):
        names = [f"l{r}_{line}" for line in range(lines)]
        for line in range(lines):
            out(f"const Bytes {names[line]} = load_bytes(lines + {64 * line + isa.width * r});")
        for expression, quad, _ in codes_of_lines(codes, 1):
            out(f"store_bytes(codes + {64 * quad + isa.width * r}, {expression.format(*names)});")
    out(f"lines += {64 * lines * UNIT_PANELS};")
    out(f"codes += {64 * quads};")
    out("}")
    out("}")
    return name


def tile_sizes(tokens: int) -> list[int]:
    """Tiles for what is left over: halves, down to one."""
    sizes = [tokens]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2 if sizes[-1] > 3 else sizes[-1] - 1)
    return sizes


def emit_tile(out: Source, isa: Isa, trits: bool, scales: str, zeros: str, tile: Tile) -> str:
    """A kernel from unpacked codes, for any number of tokens. Returns its name."""
    kind = "trits" if trits else "codes"
    name = f"tile_{kind}_{scales}_{zeros}"
    levels = 2 if trits else 1
    # An unpacked code may have all of its eight bits.
    dot = "dot" if trits or isa.largest_code >= 255 else "dot_wide"
    for tokens in tile_sizes(tile.tokens):
        out(f"inline void {name}_{tokens}(const UnitView& unit, const QuantizedView& x, float* y, uint64_t y_stride,"
            " Coming& coming) noexcept {")  # fmt: skip
        out("constexpr uint32_t panel = 0;")
        emit_pointers(out, tile.panels, zeros)
        out("const int8_t* quads = x.x;")
        emit_totals(out, isa, tile.panels, tokens, in_memory=True)
        out("uint32_t within = 0;")
        out("for (uint32_t chunk = 0; chunk < unit.chunks; ++chunk) {")
        out("coming.ask();")
        for p, t, r in cells(isa, tile.panels, tokens):
            for level in range(levels):
                out(f"Sums a{p}_{t}_{r}_{level} = zero_sums();")
        out("const uint32_t steps = chunk + 1 == unit.chunks ? unit.last_steps : unit.steps;")
        out("for (uint32_t step = 0; step < steps; ++step) {")
        for p in range(tile.panels):
            for r in range(isa.parts):
                if trits:
                    out(f"const Bytes l{p}_{r} = load_bytes(c{p} + {isa.width * r});")
                    out(f"const Bytes k{p}_{r}_0 = mask<0x01>(l{p}_{r}), k{p}_{r}_1 = mask<0x02>(l{p}_{r});")
                else:
                    out(f"const Bytes k{p}_{r}_0 = load_bytes(c{p} + {isa.width * r});")
            out(f"c{p} += 64;")
        for t in range(tokens):
            out(f"const Bytes v{t} = splat_quad(quads + {t} * x.x_stride);")
            for p in range(tile.panels):
                for r in range(isa.parts):
                    for level in range(levels):
                        a = f"a{p}_{t}_{r}_{level}"
                        out(f"{a} = {dot}({a}, k{p}_{r}_{level}, v{t});")
        out("quads += 4;")
        out("}")
        sums = {
            (p, t, r): [f"a{p}_{t}_{r}_0"] + ([f"shift_sums<1>(a{p}_{t}_{r}_1)"] if trits else [])
            for p, t, r in cells(isa, tile.panels, tokens)
        }
        emit_flush(out, isa, trits, zeros, scales, tile.panels, tokens, sums, in_memory=True)
        emit_advance(out, tile.panels, zeros)
        out("}")
        out("}")
    out(f"// {tile.panels} panels, {tile.tokens} tokens; predicted: {tile_cycles(isa, trits, tile):.2f} cycles a token"
        " and line.")  # fmt: skip
    out(f"void {name}(const UnitView& unit, const QuantizedView& x, uint64_t tokens, float* y, uint64_t y_stride)"
        " noexcept {")  # fmt: skip
    out("QuantizedView rest = x;")
    out("float* to = y;")
    out("uint64_t left = tokens;")
    out(f"Coming coming(unit, unit.chunks * ceil_div(tokens, {tile.tokens}));")
    for tokens in tile_sizes(tile.tokens):
        loop = "while" if tokens == tile.tokens or tokens == 1 else "if"
        out(f"{loop} (left >= {tokens}) {{")
        out(f"{name}_{tokens}(unit, rest, to, y_stride, coming);")
        out(f"advance(rest, to, left, {tokens}, y_stride);")
        out("}")
    out("}")
    return name


def emit(isa: Isa) -> str:
    """The whole file of one instruction set."""
    out = Source()
    out(f"// Kernels of {isa.name}, written by cpp/codegen. Do not edit.")
    out('#include "cpu/panels.h"')
    out()
    if isa.header:
        out(f"#include <{isa.header}>")
        out()
    out("#include <cstring>")
    out()
    out('#include "half.h"')
    out()
    out("namespace qmoe {")
    out.depth = 0
    out("namespace {")
    out.depth = 0
    out()
    out(f'#include "cpu/isa/{isa.name}.inc"')
    out('#include "cpu/isa/floats.inc"')
    out()
    direct: dict[tuple[str, str, str, int], str] = {}
    for codes in CODES:
        for scales in SCALES:
            for zeros in ZEROS:
                if codes == "trits" and (scales, zeros) != ("f32", "constant"):
                    continue
                for tokens in DIRECT_TOKENS:
                    tile = choose_direct(isa, codes, tokens)
                    direct[codes, scales, zeros, tokens] = emit_direct(out, isa, codes, scales, zeros, tokens, tile)
                    out()
    unpack = []
    for codes in CODES:
        unpack.append(emit_unpack(out, isa, codes))
        out()
    tiles: dict[tuple[bool, str, str], str] = {}
    for trits in (False, True):
        for scales in SCALES:
            for zeros in ZEROS:
                if trits and (scales, zeros) != ("f32", "constant"):
                    continue
                tiles[trits, scales, zeros] = emit_tile(out, isa, trits, scales, zeros, choose_tile(isa, trits))
                out()
    out.lines.append("}  // namespace")
    out()
    out(f"extern const PanelKernels panel_kernels_{isa.name};")
    out(f"const PanelKernels panel_kernels_{isa.name} = {{")
    out(f'"{isa.name}",')
    out("{")
    for codes in CODES:
        rows = []
        for scales in SCALES:
            row = []
            for zeros in ZEROS:
                names = [direct.get((codes, scales, zeros, tokens), "nullptr") for tokens in DIRECT_TOKENS]
                row.append("{" + ", ".join(names) + "}")
            rows.append("{" + ", ".join(row) + "}")
        out("{" + ", ".join(rows) + "},")
    out("},")
    out("{" + ", ".join(unpack) + "},")
    out("{")
    for trits in (False, True):
        rows = ["{" + ", ".join(tiles.get((trits, s, z), "nullptr") for z in ZEROS) + "}" for s in SCALES]
        out("{" + ", ".join(rows) + "},")
    out("},")
    out("{" + ", ".join(str(choose_tile(isa, trits).panels) for trits in (False, True)) + "},")
    out("quantize,")
    out("dequantize,")
    out("float_tile,")
    out("activate,")
    out("};")
    out()
    out.lines.append("}  // namespace qmoe")
    return "\n".join(out.lines) + "\n"
