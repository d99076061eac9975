"""First-order Taylor estimate of what dropping a block does to the response loss, per stage.

Shapes: B batch.
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
    """Harm = |gradient of an example's response loss times what the block adds to the hidden state|, a response token.

    Removing a block turns its output into its input, so to first order the loss changes by
    -gradient . (output - input) (Molchanov et al., arXiv 1611.06440, on blocks; POP, arXiv 2602.03295, for
    prefill). For prefill the gradient arrives through the cache. One forward and one backward pass a batch.
    """

    name = "taylor"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        totals, tokens = dict.fromkeys(candidates, 0.0), 0
        for batch in context.batches:
            estimates = _estimates(context, plan, batch)
            tokens += int(batch.response_mask.sum())
            for block in candidates:
                losing = plan.stages_losing(target, block)
                changes = [estimates[stage][block] for stage in losing if block in estimates[stage]]
                if changes:
                    totals[block] += float(torch.stack(changes).sum(0).abs().sum())
        return {block: total / max(tokens, 1) for block, total in totals.items()}


def _estimates(context: ScoringContext, plan: StagePlan, batch: Batch) -> dict[Stage, dict[int, Tensor]]:
    """Per stage and block, gradient . (output - input) of each example's response loss, summed over its tokens, [B]."""
    batch, student = batch.on(context.device), context.student
    mask = batch.response_mask
    seen: dict[Stage, dict[int, Change]] = {stage: {} for stage in STAGES}
    with torch.enable_grad(), eval_mode(student):
        observers = {stage: _watching(seen[stage]) for stage in STAGES}
        out = student(*batch.request, plan=plan, policy=student.policy, observers=observers)
        logits = student.logits(out.hidden[mask]).float()
        loss = F.cross_entropy(logits, batch.response_ids[mask], reduction="sum")  # an example's tokens see only it
        outputs = [output for stage in STAGES for output, _ in seen[stage].values()]
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    estimates: dict[Stage, dict[int, Tensor]] = {}
    for stage in STAGES:
        estimates[stage] = {}
        for block, (_, added) in seen[stage].items():
            gradient = next(gradients)
            if gradient is not None:
                estimates[stage][block] = (gradient.float() * added.float()).flatten(1).sum(1)
    return estimates


def _watching(seen: dict[int, Change]) -> Observer:
    def observe(block: int, before: Tensor, after: Tensor) -> None:
        seen[block] = (after, (after - before).detach())

    return observe
