"""First-order Taylor estimate of what dropping a block does to the response loss, per stage.

Shapes: N response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.plan import STAGES, Stage, StagePlan, Target
from pdtrim_pl.staged.gate import Observer

Change = tuple[Tensor, Tensor]
"""A block's output, whose gradient is wanted, and what the block added to its input."""


class Taylor(Criterion):
    """Harm = |gradient of the response loss times what the block adds to the hidden state|, summed over batches.

    Removing a block turns its output into its input, so to first order the loss changes by
    -gradient . (output - input) (Molchanov et al., arXiv 1611.06440, on blocks; POP, arXiv 2602.03295, for
    prefill). For prefill the gradient arrives through the cache. One forward and one backward pass a batch.
    """

    name = "taylor"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        totals = dict.fromkeys(candidates, 0.0)
        for batch in context.batches:
            estimates = _estimates(context, plan, batch)
            for block in candidates:
                change = sum(estimates[stage].get(block, 0.0) for stage in plan.stages_losing(target, block))
                totals[block] += abs(change)
        return totals


def _estimates(context: ScoringContext, plan: StagePlan, batch: Batch) -> dict[Stage, dict[int, float]]:
    """Per stage and block, gradient . (output - input) of one batch's response loss."""
    batch, student = batch.on(context.device), context.student
    mask = batch.response_mask
    seen: dict[Stage, dict[int, Change]] = {stage: {} for stage in STAGES}
    with torch.enable_grad(), eval_mode(student):
        observers = {stage: _watching(seen[stage]) for stage in STAGES}
        out = student(*batch.request, plan=plan, policy=student.policy, observers=observers)
        loss = F.cross_entropy(student.logits(out.hidden[mask]).float(), batch.response_ids[mask])
        outputs = [output for stage in STAGES for output, _ in seen[stage].values()]
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    estimates: dict[Stage, dict[int, float]] = {}
    for stage in STAGES:
        estimates[stage] = {}
        for block, (_, added) in seen[stage].items():
            gradient = next(gradients)
            estimates[stage][block] = 0.0 if gradient is None else float((gradient.float() * added.float()).sum())
    return estimates


def _watching(seen: dict[int, Change]) -> Observer:
    def observe(block: int, before: Tensor, after: Tensor) -> None:
        seen[block] = (after, (after - before).detach())

    return observe
