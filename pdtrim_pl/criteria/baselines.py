"""Baselines that use no data. Every criterion should beat them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class LastN(Criterion):
    """Drops the last blocks that the guards allow."""

    name = "last_n"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        return {block: -float(block) for block in candidates}


class Random(Criterion):
    """Drops blocks at random, with equal probabilities.

    Args:
        seed: seed of the random numbers. The same seed and candidates give the same choice on every rank.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        drawn = random.Random(f"{self.seed} {target} {len(plan.history)}")
        return {block: drawn.random() for block in candidates}
