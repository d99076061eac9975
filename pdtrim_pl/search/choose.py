"""One round of drops: candidates, guards, a criterion's scores, and the new plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import isfinite

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, StagePlan, Target
from pdtrim_pl.search.guards import Guards

log = logging.getLogger(__name__)


def choose_drops(
    criterion: Criterion, context: ScoringContext, plan: StagePlan, target: Target, count: int, *,
    round: int = 0, guards: Guards | None = None,
) -> StagePlan:  # fmt: skip
    """Drop the `count` blocks that hurt least from `target`; returns the new plan, its history holding the scores.

    Raises:
        UserError: fewer than `count` blocks may go.
    """
    guards = guards or Guards()
    scores: dict[int, float] = {}
    asked: set[int] = set()
    for taken in range(count):
        candidates = [b for b in plan.candidates(target, guards.protect_first, guards.protect_last)
                      if not _at_cap(plan, target, b, guards)]  # fmt: skip
        if candidates and (criterion.rescores or not asked.issuperset(candidates)):
            scores = context.ranks.agree(criterion.score(context, plan, target, candidates))
            asked = asked.union(candidates)
            _check_finite(criterion, scores)
        left = [block for block in candidates if block in scores]
        if not left:
            raise UserError(
                f"Only {taken} of the {count} blocks of round {round} can leave `{target}`: {_why(plan, guards)}. "
                "Lower the counts in `schedule`, loosen `guards`, or use a criterion that considers more blocks."
            )
        best = min(left, key=lambda block: (scores[block], block))
        plan = plan.drop(target, best, round=round, criterion=criterion.name, score=scores[best])
    warn_if_deep(plan)
    return plan


def warn_if_deep(plan: StagePlan) -> None:
    """Warn above one third of all blocks: beyond it block removal is known to break models."""
    for stage in STAGES:
        gone = len(plan.removed(stage))
        if gone * 3 > plan.model.num_blocks:
            log.warning("%d of %d blocks are gone from %s: above one third.", gone, plan.model.num_blocks, stage)


def _at_cap(plan: StagePlan, target: Target, block: int, guards: Guards) -> bool:
    losing = plan.stages_losing(target, block)
    return guards.max_removed is not None and any(len(plan.removed(stage)) >= guards.max_removed for stage in losing)


def _check_finite(criterion: Criterion, scores: Mapping[int, float]) -> None:
    wrong = {block: score for block, score in scores.items() if not isfinite(score)}
    if wrong:
        raise UserError(
            f"The criterion {criterion.name!r} gave {wrong}: harm must be a finite number. Check the model's weights "
            "and the calibration data."
        )


def _why(plan: StagePlan, guards: Guards) -> str:
    gone = ", ".join(f"{stage} runs {len(plan.blocks(stage))}" for stage in STAGES)
    return f"{gone} of {plan.model.num_blocks} blocks, and the guards are {guards}"
