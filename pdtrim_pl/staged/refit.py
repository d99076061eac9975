"""New weights for one layer of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pdtrim_pl.plan import Stage


@dataclass(frozen=True, eq=False)
class Refit:
    """New weights of one layer, fitted for a new plan. They are written into the model when the plan is applied."""

    block: int
    """Original index of the block."""
    stages: tuple[Stage, ...]
    """The stages that use the new weights: all that share the layer under the new plan."""
    layer: str
    """Name of the linear layer in the block."""
    weight: Tensor
    """[outputs, inputs]."""
