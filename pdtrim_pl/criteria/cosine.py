"""One-shot redundancy by cosine, ShortGPT's Block Influence (arXiv 2403.03853) taken per stage."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


class CosineRedundancy(Criterion):
    """Harm = 1 - cos(block input, block output), the mean over the tokens of the stages that would lose the block."""

    name = "cosine"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        influence = {}
        for block in candidates:
            cosines = [context.redundancy[stage][block] for stage in plan.stages_losing(target, block)]
            influence[block] = 1.0 - sum(cosines) / len(cosines)
        return influence
