"""Sparsity: which weights to drop, and what is left of a model without them. Everything makes or takes `Masks`.

patterns      which weights may be zero together: 2:4, 16:32, blocks, channels, any
distribution  how the zeros are spread over tensors
masks         masks by tensor name: apply, report, save, load
"""

from .distribution import distribute
from .maskfile import MaskFile
from .masks import MaskEntry, Masks
from .patterns import NM, Block, Channel, Pattern, Sparsity, Unstructured

__all__ = [
    "NM",
    "Block",
    "Channel",
    "MaskEntry",
    "MaskFile",
    "Masks",
    "Pattern",
    "Sparsity",
    "Unstructured",
    "distribute",
]
