"""Response perplexity without the block, SLEB's criterion (arXiv 2402.09025) taken per stage."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class ResponsePerplexity(Criterion):
    """Harm = mean negative log-likelihood of the calibration responses, nats, with the block gone; no teacher in it.

    Only the best candidate is scored to the end.
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
