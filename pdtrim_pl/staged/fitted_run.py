"""A block fitted to stand for a run of neighbours, while it is only on offer to the plans that name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from pdtrim_pl.plan import Move, Stage


@dataclass(frozen=True, eq=False)
class FittedRun:
    """What one block, after a local fit, makes of a run of neighbours."""

    move: Move
    """The merge: target, run, and the block that was the better one to start from."""
    stands_for: Mapping[Stage, tuple[int, ...]]
    """Per stage that merges, the original blocks the merged one stands for, as the plan's `merged` names them."""
    cosine: float
    """Mean cosine to the run's output at held positions, after the fit."""
    plain_cosine: float
    """The same before the fit: the block alone, the others of the run dropped."""
    mse: float
    """Mean squared error of one element of the output at held positions, after the fit."""
    weights: nn.Module | None
    """The fitted block in the student's element type; None where the cosine fell short of the bar."""
    trailing_blocks: Mapping[int, nn.Module] = field(default_factory=dict)
    """Blocks behind the run that were fitted with it, by their indices: plans that make the merge use them too."""

    @property
    def blocks(self) -> Mapping[int, nn.Module]:
        """All that was fitted, by index; nothing where the cosine fell short of the bar."""
        assert self.move.into is not None
        return {} if self.weights is None else {self.move.into: self.weights, **self.trailing_blocks}
