"""A move of the search: drop one block, or merge a run of neighbouring blocks into one. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdtrim_pl.plan.stage_plan import StagePlan
from pdtrim_pl.plan.stages import Target


@dataclass(frozen=True, order=True)
class Move:
    """One removal from one stage, or from both."""

    target: Target
    run: tuple[int, ...]
    """Original indices, ascending: the block that is dropped, or the neighbours that are merged."""
    into: int | None = None
    """The block of the run that stays and replaces it; None for a drop."""

    def __post_init__(self) -> None:
        assert (len(self.run) == 1) if self.into is None else (len(self.run) > 1 and self.into in self.run)

    @property
    def removed(self) -> int:
        """Number of blocks that the target loses."""
        return len(self.run) - (self.into is not None)

    def apply(
        self, plan: StagePlan, *, untied: bool = True, round: int = 0, criterion: str = "manual",
        score: float | None = None,
    ) -> StagePlan:  # fmt: skip
        """The plan after this removal; arguments as of `StagePlan.drop` and `StagePlan.merge`."""
        facts: dict[str, Any] = {"round": round, "criterion": criterion, "score": score}
        if self.into is None:
            return plan.drop(self.target, self.run[0], **facts)
        return plan.merge(self.target, self.run, self.into, untied=untied, **facts)
