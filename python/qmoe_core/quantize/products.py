"""Products of stacks of float32 matrices, by tensor cores where they lose nothing that counts.

Tensor cores multiply bfloat16 numbers without rounding and add up in float32, an order of magnitude faster than float32
units multiply. A float32 number is the sum of three bfloat16 numbers, each with the next 8 of its 24 bits, so a product
of float32 matrices is a sum of products of bfloat16 ones; those that lie below the wanted precision are left out.
"""

from __future__ import annotations

import torch


def parts(matrix: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` bfloat16 tensors whose sum is `matrix` (float32) to 8 * count bits; three of them are all of it."""
    result = []
    for _ in range(count):
        result.append(matrix.bfloat16())
        matrix = matrix - result[-1]  # exact
    return result


def has_tensor_cores(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a GPU that multiplies bfloat16 matrices into float32."""
    return (
        tensor.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
        and tensor.dtype in (torch.float32, torch.bfloat16)
    )


def product(left: torch.Tensor, right: torch.Tensor, left_parts: int = 2, right_parts: int = 2) -> torch.Tensor:
    """left @ right, (E, N, K) @ (E, K, M) -> (E, N, M) float32.

    Args:
        left_parts: how many bfloat16 numbers a number of `left` is taken as: 1 where it is one (also if it is stored as
            one), 2 for 16 bits, 3 for 24. right_parts: likewise. Every product is right to 8 times the larger of the
            two bits, relative to the product of the magnitudes. Without tensor cores this is an ordinary product.
    """
    if not has_tensor_cores(right):
        return torch.bmm(left.to(right.dtype), right)
    lefts, rights = parts(left, left_parts) if left_parts > 1 else [left.bfloat16()], parts(right, right_parts)
    if left_parts == 1 and right_parts == 1:
        return torch.bmm(lefts[0], rights[0], out_dtype=torch.float32)
    pairs = [(i, j) for i in range(left_parts) for j in range(right_parts) if i + j < max(left_parts, right_parts)]
    # One product over all pairs, one behind the other: sums stay in the registers of the tensor cores.
    return torch.bmm(
        torch.cat([lefts[i] for i, _ in pairs], dim=2),
        torch.cat([rights[j] for _, j in pairs], dim=1),
        out_dtype=torch.float32,
    )


class LeftSide:
    """A stack R (E, N, K) float32 that changes a few columns at a time and is multiplied in between, right to 16 bits
    as `product` is by default.

    For tensor cores the bfloat16 parts of every block of columns lie together, as they are multiplied: high, high, low
    by high, low, high of the other side. So the first columns of the stack are the first ones here, too.
    """

    def __init__(self, stack: torch.Tensor, block: int, zero: bool = False) -> None:
        """`block`: columns that change together. `zero`: the stack is all zeros as yet."""
        self.stack, self.block = stack, block
        self.parts: torch.Tensor | None = None
        if has_tensor_cores(stack):
            experts, rows, columns = stack.shape
            self.parts = torch.empty((experts, rows, 3 * columns), dtype=torch.bfloat16, device=stack.device)
            if not zero:
                whole = columns // block * block
                self._write(stack[:, :, :whole].unflatten(2, (-1, block)), self.parts[:, :, : 3 * whole])
                self._write(stack[:, :, None, whole:], self.parts[:, :, 3 * whole :])

    def _write(self, blocks: torch.Tensor, parts: torch.Tensor) -> None:
        """blocks (E, N, B, W) into parts (E, N, 3 B W)."""
        if blocks.numel():
            into = parts.unflatten(2, (blocks.shape[2], 3, blocks.shape[3]))
            into[:, :, :, 0] = blocks
            into[:, :, :, 1] = into[:, :, :, 0]
            into[:, :, :, 2] = blocks - into[:, :, :, 0]

    def update(self, columns: slice) -> None:
        """Takes in a block that has changed: these columns of `stack`, the first a multiple of `block`."""
        if self.parts is not None:
            self._write(self.stack[:, :, None, columns], self.parts[:, :, 3 * columns.start : 3 * columns.stop])

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """The first k columns, whole blocks or all of them, times `right` (E, k, M): (E, N, M) float32."""
        inner = right.shape[1]
        if self.parts is None:
            return torch.bmm(self.stack[:, :, :inner], right)
        high, low = parts(right, 2)
        pieces = [
            part[:, first : first + self.block] for first in range(0, inner, self.block) for part in (high, low, high)
        ]
        return torch.bmm(self.parts[:, :, : 3 * inner], torch.cat(pieces, dim=1), out_dtype=torch.float32)
