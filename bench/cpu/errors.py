"""How far the CPU kernels are from float64, for every instruction set that this machine has.

    python bench/cpu/errors.py --output bench/results/cpu-errors.json

Normal activations and weights of random codes. A product is one token's through a matrix of 2048 x 2048; a layer is 8
experts of 2048 x 768, two for each token, with SwiGLU between: two products in sequence, the first of which is taken
twice and multiplied with itself. The reference multiplies the decoded weights in float64. The error is that of all
outputs together, in norm. With int8, activations share a scale per group of the weights or 128 columns, whichever is
shorter: a shorter group shows what shorter chunks would gain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_core import _C
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor
from qmoe_core.runtime import ops
from qmoe_core.runtime.gating import Gating

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

HIDDEN, WIDTH, EXPERTS, TOKENS, TOP_K = 2048, 768, 8, 32, 2
ISAS = ("generic", "avx2", "avx512", "amx", "neon")
KINDS = tuple((bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128))


def random_stack(generator: np.random.Generator, count: int, rows: int, columns: int, bits: int, group: int) -> Any:
    """`count` matrices whose products of normal activations are about normal; (record, float64 (count, N, K))."""
    codes_deviation = ((4**bits - 1) / 12) ** 0.5
    scale = np.float32(np.float16(1 / (codes_deviation * columns**0.5)))
    matrices = [
        IntMatrix(
            IntFormat(bits, group, half_step=True),
            generator.integers(0, 2**bits, (rows, columns), dtype=np.uint8),
            np.full((rows, columns // group), scale),
            np.full((rows, columns // group), 2 ** (bits - 1) - 1, dtype=np.uint8),  # and a half: no code is the mean
        )
        for _ in range(count)
    ]
    record = torch.from_numpy(PackedTensor.pack(matrices).data)
    return record, torch.from_numpy(np.stack([matrix.dequantize() for matrix in matrices])).double()


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def measure() -> list[dict[str, Any]]:
    """All kinds with the instruction set that this process is pinned to."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_normal((TOKENS, HIDDEN), dtype=np.float32))
    ids = torch.from_numpy(np.stack([generator.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]))
    weights = torch.full((TOKENS, TOP_K), 1 / TOP_K)
    rows = []
    for bits, group in KINDS:
        matrix, dense = random_stack(generator, 1, HIDDEN, HIDDEN, bits, group)
        first, dense_first = random_stack(generator, EXPERTS, 2 * WIDTH, HIDDEN, bits, group)
        second, dense_second = random_stack(generator, EXPERTS, HIDDEN, WIDTH, bits, group)
        product = x.double() @ dense[0].T
        layer = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for token, j in np.ndindex(TOKENS, TOP_K):
            expert = int(ids[token, j])
            gate, up = (dense_first[expert] @ x[token].double()).chunk(2)
            layer[token] += dense_second[expert] @ (torch.nn.functional.silu(gate) * up) / TOP_K
        row: dict[str, Any] = {"bits": bits, "group": group}
        for compute in ("int8", "float"):
            row[f"product_{compute}"] = relative(ops.linear(x, matrix, HIDDEN, compute), product)
            through = ops.experts(x, ids, weights, first, second, Gating("halves"), compute=compute)
            row[f"layer_{compute}"] = relative(through, layer)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    rows = []
    for isa in ISAS:
        if isa not in ("generic", *_C.cpu_features()):
            continue
        result = subprocess.run(
            [sys.executable, __file__, "--measure"],
            capture_output=True, text=True, check=True, env={**os.environ, "QMOE_FORCE_ISA": isa},
        )  # fmt: skip
        rows += [{"isa": isa, **row} for row in json.loads(result.stdout)]
    for row in rows:
        print(json.dumps(row))
    if arguments.output is not None:
        write_results(arguments.output, "cpu-errors", rows)


if __name__ == "__main__":
    main()
