"""First-order effects of channels or query heads on the response loss. One backward pass a batch gives all blocks.

Shapes: B batch, T tokens of a stage, I inputs of a last layer, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.criteria.taylor import summed_loss
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import measured_by_ranks
from pdtrim_pl.evaluation.tokens import CHUNK_TOKENS
from pdtrim_pl.losses import chunks
from pdtrim_pl.plan import STAGES, Part, Stage, StagePlan
from pdtrim_pl.staged.gate import current_pass

Effects = Mapping[tuple[Stage, int], Tensor]
"""(stage, original index of a block) -> effects of its units, [U]."""


def unit_effects(context: ScoringContext, plan: StagePlan, part: Part, batches: Sequence[Batch]) -> Effects:
    """First-order effects: |output of a unit x gradient of an example's response loss|, summed over examples.

    The product is summed over the tokens of an example before its absolute value is taken. Gradients reach prefill
    through the cache. The batches are split among the ranks; every rank gets all effects.

    Args:
        context: student and device.
        plan: the plan that the student runs under.
        part: channels or heads.
        batches: prompts and responses, the same on every rank.
    """

    def effects(batch: Batch, peers: Sequence[Batch]) -> dict[tuple[Stage, int], Tensor]:
        longest = max(int(peer.response_mask.sum()) for peer in peers)
        return _effects(context, plan, part, batch, len(chunks(longest, CHUNK_TOKENS)))

    total: dict[tuple[Stage, int], Tensor] = {}
    for found in measured_by_ranks(context.ranks, batches, effects):
        for key, value in found.items():
            total[key] = total[key] + value if key in total else value
    return total


def _effects(
    context: ScoringContext, plan: StagePlan, part: Part, batch: Batch, min_chunks: int
) -> dict[tuple[Stage, int], Tensor]:
    """The effects of one batch, in host memory."""
    batch, student = batch.on(context.device), context.student
    units, layer = plan.model.sizes[part], student.architecture.cuts[part].columns
    assert units is not None
    seen: dict[tuple[Stage, int], Tensor] = {}
    with torch.enable_grad(), eval_mode(student), ExitStack() as hooks:
        for stage in STAGES:
            for block in plan.blocks(stage):
                last = student.gates[block].weights(stage, plan).get_submodule(layer)
                handle = last.register_forward_pre_hook(_keeping(seen, stage, block))
                hooks.callback(handle.remove)
        out = student(*batch.request, plan=plan, policy=student.policy)
        mask = batch.response_mask
        # Examples do not affect each other, so the gradient of their summed loss holds the gradient of each.
        loss = summed_loss(student.compared_logits, out.hidden[mask], batch.response_ids[mask], min_chunks)
        gradients = torch.autograd.grad(loss, list(seen.values()), allow_unused=True)
    effects = {}
    for (key, inputs), gradient in zip(seen.items(), gradients, strict=True):
        if gradient is not None:
            by_unit = (gradient.float() * inputs.detach().float()).sum(1).view(len(inputs), units, -1).sum(2)
            effects[key] = by_unit.abs().sum(0).cpu()
    return effects


def _keeping(seen: dict[tuple[Stage, int], Tensor], stage: Stage, block: int) -> Any:
    """A forward pre-hook that stores the inputs of a last layer in one stage."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        if current_pass().stage == stage:  # both stages may run one layer
            seen[stage, block] = args[0] if args[0].requires_grad else args[0].requires_grad_()

    return keep
