"""Greedy choice by KL to the teacher under the contract. Candidates are scored again after every drop."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.criteria.cosine import CosineRedundancy
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import StagePlan, Target


class GreedyKL(Criterion):
    """Harm = mean KL(teacher || student) over calibration responses without the block. The other stage stays as it is.

    Only the best candidate is evaluated on all batches.

    Args:
        pool: number of candidates to score: the most redundant ones by cosine. None scores all candidates.

    Raises:
        UserError: `pool` is below 1.
    """

    name = "greedy_kl"
    rescores = True

    def __init__(self, pool: int | None = None) -> None:
        if pool is not None and pool < 1:
            raise UserError(f"`pool` is {pool}: give at least 1, or null to score every candidate.")
        self.pool = pool

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        pool = self._pool(context, plan, target, candidates)
        evaluator = context.evaluator
        evaluator.rebase(plan)
        trials = [evaluator.candidate(plan.drop(target, block)) for block in pool]
        best, energy = evaluator.best(trials, progress=context.counting(len(trials)))
        return {pool[best]: energy}  # the others are certain to do more harm

    def _pool(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> Sequence[int]:
        if self.pool is None or self.pool >= len(candidates):
            return sorted(candidates)
        influence = CosineRedundancy().score(context, plan, target, candidates)
        return sorted(sorted(candidates, key=lambda block: (influence[block], block))[: self.pool])
