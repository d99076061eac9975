"""One round of drops: candidates, guards, a criterion's scores, and the new plan."""

from __future__ import annotations

import logging

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import STAGES, StagePlan, Target
from pdtrim_pl.search.guards import Guards

log = logging.getLogger(__name__)


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
            scores = context.agree(criterion.score(context, plan, target, candidates))
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
