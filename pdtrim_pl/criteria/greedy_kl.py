"""Greedy KL to the teacher under the contract, scored anew after every drop."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.criteria.cosine import CosineRedundancy
from pdtrim_pl.plan import StagePlan, Target


class GreedyKL(Criterion):
    """Harm = mean KL(teacher || student) over calibration responses with the block gone and the other stage as it is.

    Args:
        pool: score only so many candidates, the most redundant by cosine; None scores all of them.

    Raises:
        ValueError: `pool` is below 1.
    """

    name = "greedy_kl"
    rescores = True

    def __init__(self, pool: int | None = None) -> None:
        if pool is not None and pool < 1:
            raise ValueError(f"`pool` is {pool}: give at least 1, or null to score every candidate.")
        self.pool = pool

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        influence = CosineRedundancy().score(context, plan, target, candidates)
        pool = sorted(candidates, key=lambda block: (influence[block], block))[: self.pool]
        context.evaluator.rebase(plan)
        energies: dict[int, float] = {}
        for done, block in enumerate(pool):
            context.progress(f"candidate {done + 1} of {len(pool)}")
            energy = context.evaluator.energy_below(plan.drop(target, block), min(energies.values(), default=inf))
            if energy is not None:  # else it is certain that another one hurts less
                energies[block] = energy
        return energies
