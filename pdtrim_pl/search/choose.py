"""One round of drops: candidates, guards, a criterion's scores, and the new plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import STAGES, StagePlan, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guards:
    """What no round may do."""

    protect_first: int = 1
    """So many of the first blocks are never dropped."""
    protect_last: int = 1
    """So many of the last blocks are never dropped."""
    max_removed: int | None = None
    """At most so many blocks may be gone from a stage; None sets no cap."""

    def __post_init__(self) -> None:
        if self.protect_first < 0 or self.protect_last < 0 or (self.max_removed is not None and self.max_removed < 0):
            raise ValueError(f"`guards` must not be negative, got {self}.")


def choose_drops(
    criterion: Criterion, context: ScoringContext, plan: StagePlan, target: Target, count: int, *,
    round: int = 0, guards: Guards | None = None,
) -> StagePlan:  # fmt: skip
    """Drop the `count` blocks that hurt least from `target`; returns the new plan, its history holding the scores.

    Raises:
        ValueError: fewer than `count` blocks may go.
    """
    guards = guards or Guards()
    scores: dict[int, float] = {}
    for taken in range(count):
        candidates = plan.candidates(target, guards.protect_first, guards.protect_last)
        if not candidates or _at_cap(plan, target, guards):
            raise ValueError(
                f"Only {taken} of the {count} blocks of round {round} can leave `{target}`: "
                f"{_why(plan, guards)}. Lower the counts in `schedule`, or loosen `guards`."
            )
        if criterion.rescores or not all(block in scores for block in candidates):
            scores = criterion.score(context, plan, target, candidates)
        best = min((block for block in candidates if block in scores), key=lambda block: (scores[block], block))
        plan = plan.drop(target, best, round=round, criterion=criterion.name, score=scores[best])
    warn_if_deep(plan)
    return plan


def warn_if_deep(plan: StagePlan) -> None:
    """Warn above one third of all blocks: beyond it block removal is known to break models."""
    for stage in STAGES:
        gone = len(plan.removed(stage))
        if gone * 3 > plan.model.num_blocks:
            log.warning("%d of %d blocks are gone from %s: above one third.", gone, plan.model.num_blocks, stage)


def _at_cap(plan: StagePlan, target: Target, guards: Guards) -> bool:
    stages = STAGES if target == "both" else (target,)
    return guards.max_removed is not None and any(len(plan.removed(s)) >= guards.max_removed for s in stages)


def _why(plan: StagePlan, guards: Guards) -> str:
    gone = ", ".join(f"{stage} runs {len(plan.blocks(stage))}" for stage in STAGES)
    return f"{gone} of {plan.model.num_blocks} blocks, and the guards are {guards}"
