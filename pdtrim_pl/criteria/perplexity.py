"""Response perplexity without the block: the criterion of SLEB (arXiv 2402.09025), per stage."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class ResponsePerplexity(Criterion):
    """Harm = mean negative log-likelihood of the calibration responses without the block, nats. Needs no teacher.

    Only the best candidate is evaluated on all batches.
    """

    name = "perplexity"
    rescores = True

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        evaluator = context.evaluator
        evaluator.rebase(plan)
        trials = [evaluator.candidate(plan.drop(target, block)) for block in candidates]
        best, nll = evaluator.best(trials, by="nll", progress=context.counting(len(trials)))
        return {candidates[best]: nll}
