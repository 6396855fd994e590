"""What the generator knows of an instruction set: its registers, what its dot product takes, what things cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    Attributes:
        name: of the generated file, of `cpp/src/cpu/isa/<name>.inc`, and what QMOE_FORCE_ISA takes.
        width: bytes of a vector register; a line of 64 bytes takes 64 / width of them.
        registers: vector registers that the allocator can use.
        largest_code: the largest unsigned byte that `dot` multiplies without saturating.
        simple, dot, convert, load: cycles between two instructions of that kind on one core (reciprocal throughput),
            for one register. simple: and, shift, add. convert also stands for floating-point multiply-add.
        issue: instructions that a core starts per cycle.
        dot_instructions: how many instructions `dot` is.
        header: that declares the intrinsics.
        vector: False for the portable code, which gets one panel and one token at a time: there are no registers to
            fill, and compilers take minutes over large tiles of loops.
    """

    name: str
    width: int
    registers: int
    largest_code: int
    simple: float
    dot: float
    convert: float
    load: float
    issue: float
    dot_instructions: int = 1
    header: str = "immintrin.h"
    vector: bool = True

    @property
    def parts(self) -> int:
        """Registers of a line."""
        return 64 // self.width


# Reciprocal throughputs: AVX-512 on Sapphire Rapids (two 512-bit ports; measured: and, add and vpdpbusd at 4.6 G/s a
# core, which is two a cycle), AVX2 on the same core, NEON on a Neoverse V1 (four 128-bit pipes). The portable code has
# no registers to choose for.
ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512vnni", 64, 32, 255, simple=0.5, dot=0.5, convert=0.5, load=0.5, issue=6),
        Isa("avx2", 32, 16, 128, simple=0.34, dot=1.17, convert=0.5, load=0.34, issue=6, dot_instructions=3),
        Isa("neon", 16, 32, 127, simple=0.25, dot=0.25, convert=0.25, load=0.34, issue=8, header="arm_neon.h"),
        Isa("generic", 64, 16, 255, simple=4.0, dot=24.0, convert=4.0, load=4.0, issue=4, header="", vector=False),
    )
}

# Where a processor differs from the costs above, by instruction set. Zen 4's registers are 512 bits wide and its units
# 256: two simple instructions a cycle, one dot product, multiplication or load.
CORES: dict[str, Mapping[str, Mapping[str, float]]] = {
    "sapphire rapids": {},
    "zen 4": {"avx512vnni": {"dot": 1.0, "convert": 1.0, "load": 1.0}, "avx2": {"simple": 0.25, "dot": 0.75}},
}


def on_core(isa: Isa, core: str) -> Isa:
    """`isa` with the costs of one processor."""
    return replace(isa, **CORES[core].get(isa.name, {}))
