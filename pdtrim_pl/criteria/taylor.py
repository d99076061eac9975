"""First-order Taylor estimate of how dropping a block changes the response loss, per stage.

Shapes: B batch, N response tokens of a batch without padding, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import measured_by_ranks
from pdtrim_pl.evaluation.tokens import CHUNK_TOKENS
from pdtrim_pl.losses import Head, chunks
from pdtrim_pl.plan import STAGES, Stage, StagePlan, Target
from pdtrim_pl.staged.gate import Observer

Change = tuple[Tensor, Tensor]
"""The output of a block, whose gradient is needed, and what the block added to its input."""


class Taylor(Criterion):
    """Harm = |gradient . (output - input)| of a block, summed over examples and divided by the response tokens.

    The gradient is that of an example's response loss with respect to the block's output. Dropping a block replaces its
    output by its input, so to first order the loss changes by -gradient . (output - input) (Molchanov et al., arXiv
    1611.06440, for blocks; POP, arXiv 2602.03295, for prefill). In prefill the gradient arrives through the cache. Each
    batch needs one forward and one backward pass. The logits of few tokens are in memory at once. The batches are split
    among the ranks.
    """

    name = "taylor"

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:

        def harms(batch: Batch, peers: Sequence[Batch]) -> dict[int, float]:
            """Harm of each candidate on one batch, summed over its examples."""
            effects = gate_effects(context, plan, target, candidates, batch, peers)
            return {block: float(effect.abs().sum()) for block, effect in effects.items()}

        tokens = sum(int(batch.response_mask.sum()) for batch in context.batches)
        every = measured_by_ranks(context.ranks, context.batches, harms)
        return {block: sum(found[block] for found in every) / max(tokens, 1) for block in candidates}


def gate_effects(
    context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int], batch: Batch,
    peers: Sequence[Batch],
) -> dict[int, Tensor]:  # fmt: skip
    """Per candidate: gradient . (output - input) for the response loss of each example, [B], fp32.

    It is the derivative with respect to a gate before what the block adds, summed over the stages that lose the block.

    Args:
        context: student and device.
        plan: the plan that the student runs under.
        target: the stage(s) that would lose the blocks.
        candidates: original indices.
        batch: the batch.
        peers: the batches that all ranks run at the same time.
    """
    longest = max(int(peer.response_mask.sum()) for peer in peers)
    estimates = _estimates(context, plan, batch, len(chunks(longest, CHUNK_TOKENS)))
    found = {}
    for block in candidates:
        losing = [stage for stage in plan.stages_losing(target, block) if block in estimates[stage]]
        changes = [estimates[stage][block] for stage in losing]
        found[block] = torch.stack(changes).sum(0) if changes else torch.zeros(len(batch.prompt_ids))
    return found


def _estimates(
    context: ScoringContext, plan: StagePlan, batch: Batch, min_chunks: int
) -> dict[Stage, dict[int, Tensor]]:
    """Per stage and block: gradient . (output - input) for the response loss of each example, [B]."""
    batch, student = batch.on(context.device), context.student
    mask = batch.response_mask
    seen: dict[Stage, dict[int, Change]] = {stage: {} for stage in STAGES}
    with torch.enable_grad(), eval_mode(student):
        observers = {stage: _watching(seen[stage]) for stage in STAGES}
        out = student(*batch.request, plan=plan, policy=student.policy, observers=observers)
        # Examples do not see each other, so the gradients of the summed loss are those of each example.
        loss = summed_loss(student.compared_logits, out.hidden[mask], batch.response_ids[mask], min_chunks)
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


def summed_loss(head: Head, hidden: Tensor, targets: Tensor, min_chunks: int) -> Tensor:
    """Summed cross-entropy of response tokens. Backward recomputes the logits chunk by chunk.

    Args:
        head: from hidden states to logits.
        hidden: final hidden states that predict the tokens, [N, H].
        targets: token ids, [N].
        min_chunks: minimum number of calls of the head. With a sharded head all ranks must make the same number.
    """

    def of_chunk(states: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), ids, reduction="sum")

    parts = chunks(len(targets), CHUNK_TOKENS, min_chunks)
    losses = [checkpoint(of_chunk, hidden[part], targets[part], use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def _watching(seen: dict[int, Change]) -> Observer:
    def observe(block: int, before: Tensor, after: Tensor) -> None:
        seen[block] = (after, (after - before).detach())

    return observe
