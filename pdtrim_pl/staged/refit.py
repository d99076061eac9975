"""New weights of one layer of a block, for the stages that use them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pdtrim_pl.plan import Stage


@dataclass(frozen=True, eq=False)
class Refit:
    """A layer whose weights were fitted anew, beside a plan that needs them so."""

    block: int
    """Original index."""
    stages: tuple[Stage, ...]
    """Those that use the new weights: all that share the layer under the plan."""
    layer: str
    """Linear layer, by its name in the block."""
    weight: Tensor
    """[outputs, inputs]."""
