"""Choices that look at no data: what any criterion has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class LastN(Criterion):
    """Drop the deepest blocks that the guards allow."""

    name = "last_n"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        return {block: -float(block) for block in candidates}


class Random(Criterion):
    """Drop blocks drawn evenly.

    Args:
        seed: of the draws; the same seed and candidates give the same choice on every rank.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        drawn = random.Random(f"{self.seed} {target} {len(plan.history)}")
        return {block: drawn.random() for block in candidates}
