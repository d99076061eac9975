"""A block fitted to replace a run of neighbours. Plans can try it before it becomes part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from pdtrim_pl.plan import Move, Stage


@dataclass(frozen=True, eq=False)
class FittedRun:
    """Result of a local fit: one block that replaces a run of neighbouring blocks."""

    move: Move
    """The merge: target, run, and the block that the fit started from."""
    stands_for: Mapping[Stage, tuple[int, ...]]
    """Per stage that merges: the original blocks that the merged block replaces, as in `StagePlan.merged`."""
    cosine: float
    """Mean cosine similarity to the run's output on held-out positions, after the fit."""
    plain_cosine: float
    """The same before the fit: the merged block runs with its old weights, the others of the run are dropped."""
    mse: float
    """Mean squared error per element of the output on held-out positions, after the fit."""
    weights: nn.Module | None
    """The fitted block in the student's element type; None if `cosine` is below the threshold."""
    trailing_blocks: Mapping[int, nn.Module] = field(default_factory=dict)
    """Original index -> a block after the run that was fitted with it. Plans with this merge use these blocks too."""

    @property
    def blocks(self) -> Mapping[int, nn.Module]:
        """Original index -> fitted block, trailing blocks included; empty if `cosine` is below the threshold."""
        assert self.move.into is not None
        return {} if self.weights is None else {self.move.into: self.weights, **self.trailing_blocks}
