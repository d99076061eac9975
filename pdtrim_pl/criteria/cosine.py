"""One-shot redundancy by cosine similarity: the Block Influence of ShortGPT (arXiv 2403.03853), per stage."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import StagePlan, Target


class CosineRedundancy(Criterion):
    """Harm = 1 - cos(block input, block output), averaged over the stages that would lose the block.

    Raises:
        UserError: such a stage has no calibration token.
    """

    name = "cosine"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        influence = {}
        for block in candidates:
            without = [stage for stage in plan.stages_losing(target, block) if not context.redundancy[stage]]
            if without:
                raise UserError(
                    f"No calibration token reaches {' and '.join(without)}: every response has one token, which "
                    "prefill predicts. Use longer responses (`lengths` of the data)."
                )
            cosines = [context.redundancy[stage][block] for stage in plan.stages_losing(target, block)]
            influence[block] = 1.0 - sum(cosines) / len(cosines)
        return influence
