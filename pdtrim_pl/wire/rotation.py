"""The orthonormal Hadamard rotation of vectors. It uses only sums in a fixed order, so every device gets the same bits.

A vector of D elements is cut into pieces, whose length is the largest power of two that divides D. Each piece is
rotated.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor


def rotated(vectors: Tensor) -> Tensor:
    """Rotate the last dimension, [..., D] in fp32. The rotation is its own inverse, up to rounding."""
    size = vectors.shape[-1] & -vectors.shape[-1]
    half = 1
    out = vectors
    while half < size:
        pairs = out.reshape(*vectors.shape[:-1], -1, 2, half)
        upper, lower = pairs.unbind(dim=-2)
        out = torch.stack([upper + lower, upper - lower], dim=-2).reshape(vectors.shape)
        half *= 2
    return out * (1 / sqrt(size))
