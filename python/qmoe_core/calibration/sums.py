"""Sums over tokens of x x^T and of other outer products."""

from __future__ import annotations

import torch

ROWS = 16384  # rows that one product takes at a time; fixed, since the order of summation depends on it
BLOCK = 256  # columns of a symmetric sum that one product makes


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (K, K) += left^T right, both (rows, K) float32."""
    for first in range(0, len(left), ROWS):
        total.addmm_(left[first : first + ROWS].T, right[first : first + ROWS])


def add_squares(total: torch.Tensor, x: torch.Tensor) -> None:
    """total (K, K) += x^T x, x (rows, K) float32. On a CPU what is below the diagonal is left for `complete`: nearly
    half of the multiplications. (A GPU would be idle half of the time in products as narrow as that.)"""
    if total.is_cuda:
        add_products(total, x, x)
        return
    for first in range(0, len(x), ROWS):
        piece = x[first : first + ROWS]
        for column in range(0, total.shape[0], BLOCK):
            total[column : column + BLOCK, column:].addmm_(piece[:, column : column + BLOCK].T, piece[:, column:])


def complete(total: torch.Tensor) -> None:
    """Makes a sum of `add_squares` symmetric."""
    if total.is_cuda:
        return
    for column in range(BLOCK, total.shape[0], BLOCK):
        before = slice(column - BLOCK, column)
        total[column:, before].copy_(total[before, column:].T)
