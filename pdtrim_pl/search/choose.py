"""One round of drops: score the candidates with a criterion, respect the guards, and return the new plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import cast

from pdtrim_pl.criteria.base import Criterion, Progress, ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, StagePlan, Target
from pdtrim_pl.search.greedy import Option, grow
from pdtrim_pl.search.guards import Guards

log = logging.getLogger(__name__)


def choose_drops(
    criterion: Criterion, context: ScoringContext, plan: StagePlan, target: Target, count: int, *,
    round: int = 0, guards: Guards | None = None,
) -> StagePlan:  # fmt: skip
    """Drop the `count` blocks of least harm from `target`. The history of the new plan contains their scores.

    Raises:
        UserError: fewer than `count` blocks can be dropped, or a score is not finite.
    """
    guards = guards or Guards()
    chooser = _LeastScore(criterion, context, target, round)
    grown = grow(_Drops(target, count, guards), _Dropped(plan), chooser)
    plan = grown.state.plan
    if not grown.reached:
        raise UserError(
            f"Only {grown.state.count} of the {count} blocks of round {round} can leave `{target}`: "
            f"{_why(plan, guards)}. Lower the counts in `schedule`, loosen `guards`, or use a criterion that considers "
            "more blocks."
        )
    warn_if_deep(plan)
    return plan


@dataclass(frozen=True)
class _Dropped:
    """A plan, and the number of blocks that this round has dropped so far."""

    plan: StagePlan
    count: int = 0


@dataclass(frozen=True)
class _Drops:
    """The `Growth` of a round: plans lose one block of the target after another, until `count` are gone."""

    target: Target
    count: int
    guards: Guards

    def reached(self, state: _Dropped) -> bool:
        return state.count == self.count

    def options(self, state: _Dropped) -> list[Option[_Dropped]]:
        plan, guards = state.plan, self.guards
        blocks = plan.candidates(self.target, guards.protect_first, guards.protect_last)
        return [
            Option(block, _Dropped(plan.drop(self.target, block), state.count + 1))
            for block in blocks
            if not _at_cap(plan, self.target, block, guards)
        ]

    def step(self, state: _Dropped, progress: Progress) -> Progress:
        return progress


class _LeastScore:
    """The `Chooser` of a round: takes the block of least harm, and writes its score into the history of the plan."""

    def __init__(self, criterion: Criterion, context: ScoringContext, target: Target, round: int) -> None:
        self.criterion, self.context, self.target, self.round = criterion, context, target, round
        self.scores: dict[int, float] = {}
        self.asked: set[int] = set()

    def choose(
        self, state: _Dropped, options: Sequence[Option[_Dropped]], value: float, progress: Progress
    ) -> tuple[Option[_Dropped], float] | None:
        candidates = [cast(int, option.choice) for option in options]
        if self.criterion.rescores or not self.asked.issuperset(candidates):
            found = self.criterion.score(self.context, state.plan, self.target, candidates)
            self.scores = self.context.ranks.agree(found)
            self.asked.update(candidates)
            _check_finite(self.criterion, self.scores)
        left = [block for block in candidates if block in self.scores]
        if not left:
            return None
        best = min(left, key=lambda block: (self.scores[block], block))
        score = self.scores[best]
        plan = state.plan.drop(self.target, best, round=self.round, criterion=self.criterion.name, score=score)
        return Option(best, _Dropped(plan, state.count + 1)), score


def warn_if_deep(plan: StagePlan) -> None:
    """Warn if more than one third of all blocks are gone: removing more is known to break models."""
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
