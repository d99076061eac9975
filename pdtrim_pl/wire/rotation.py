"""The orthonormal Hadamard rotation of vectors, written with sums alone so that it is exact to the bit anywhere.

A vector of D elements is cut into pieces of the largest power of two that divides D; each piece is rotated.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor


def rotated(vectors: Tensor) -> Tensor:
    """Rotate the last dimension, [..., D] in fp32; applied twice it gives the vectors back, up to rounding."""
    size = vectors.shape[-1] & -vectors.shape[-1]
    half = 1
    out = vectors
    while half < size:
        pairs = out.reshape(*vectors.shape[:-1], -1, 2, half)
        upper, lower = pairs.unbind(dim=-2)
        out = torch.stack([upper + lower, upper - lower], dim=-2).reshape(vectors.shape)
        half *= 2
    return out * (1 / sqrt(size))
