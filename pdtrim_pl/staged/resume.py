"""Where a pass starts that continues an earlier one.

Shapes: B batch, T new tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pdtrim_pl.staged.cache import BlockKV


@dataclass(frozen=True, eq=False)
class Resume:
    """Start a pass at a block in the middle. An earlier pass over the same tokens has run the blocks before it."""

    block: int
    """Original index of the block to start at."""
    hidden: Tensor
    """Hidden state that reaches this block, [B, T, H]."""
    cached: Mapping[int, BlockKV]
    """Original index -> keys and values of the earlier pass, for the blocks before this one that later passes need."""
