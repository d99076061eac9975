"""Response perplexity without the block, SLEB's criterion (arXiv 2402.09025) taken per stage."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class ResponsePerplexity(Criterion):
    """Harm = mean negative log-likelihood of the calibration responses, nats, with the block gone; no teacher in it."""

    name = "perplexity"
    rescores = True

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        context.evaluator.rebase(plan)
        losses = {}
        for done, block in enumerate(candidates):
            context.progress(f"candidate {done + 1} of {len(candidates)}")
            losses[block] = context.evaluator.measure(plan.drop(target, block)).nll
        return losses
