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
    flat = vectors.reshape(-1, size).T.contiguous()  # sums of long rows: much faster than of neighbours
    half = 1
    while half < size:
        upper, lower = flat.view(size // (2 * half), 2, half, -1).unbind(dim=1)
        flat = torch.stack([upper + lower, upper - lower], dim=1).view(size, -1)
        half *= 2
    return (flat * (1 / sqrt(size))).T.reshape(vectors.shape)
