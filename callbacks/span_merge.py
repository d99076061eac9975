"""Replaces a span of neighbours by one block that is fitted locally before distillation begins."""

from __future__ import annotations

import logging
from dataclasses import replace

from lightning.pytorch import Trainer
from typing_extensions import override

from callbacks.removal_rounds import RemovalRounds, fitting_batches, scoring_context
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.search import Guards, replace_span
from pdtrim_pl.sizing.callback_load import CallbackLoad

log = logging.getLogger(__name__)

LONG_FIT = Merging(min_cosine=-1.0, steps=1024, learning_rate=0.015)


class SpanMerge(RemovalRounds):
    """Replaces `blocks + 1` neighbours of both stages by one block, at the start of an epoch.

    First it fits a block briefly to every span and takes the span with the least KL on the calibration set. Then it
    fits a block to this span for `merging.steps`. Some trailing blocks behind the span learn too, and make up for what
    one block cannot do. With enough training text this loses less than drops (docs/results).

    Args:
        blocks: how many to remove.
        epoch: when, from 0.
        merging: the long fit, on `steps` batches of training text. Strategies that shard weights need `tied: true`.
        screening_steps: optimizer steps of each brief fit.
        trailing_blocks: trailing blocks that learn with the span.
        guards: blocks that must stay.
        memory: how much the evaluation of spans may keep.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self, blocks: int, epoch: int = 0, merging: Merging = LONG_FIT, screening_steps: int = 64,
        trailing_blocks: int = 2, guards: Guards = Guards(), memory: SearchMemory = SearchMemory(),
    ) -> None:  # fmt: skip
        if min(blocks, screening_steps) < 1 or min(epoch, trailing_blocks) < 0:
            raise UserError(
                "A span merge needs `blocks` >= 1 and `epoch` >= 0, `screening_steps` >= 1 and `trailing_blocks` >= 0, "
                f"and has {blocks}, {epoch}, {screening_steps} and {trailing_blocks}."
            )
        super().__init__("span merge", [epoch], guards, merging, memory)
        self.blocks, self.screening_steps, self.trailing_blocks = blocks, screening_steps, trailing_blocks

    @override
    def load(self) -> CallbackLoad:
        load = super().load()
        return replace(load, fitted_at_once=max(load.fitted_at_once, 2 * (1 + self.trailing_blocks)))

    @override
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        assert self.merging is not None
        log.info("Fitting one block to every %d neighbours.", self.blocks + 1)
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            text = fitting_batches(trainer, self.merging.batches)
            plan = replace_span(
                context,
                module.plan,
                self.blocks,
                self.merging,
                self.guards,
                text,
                self.screening_steps,
                self.trailing_blocks,
            )
        module.apply_plan(StagePlan.from_json(context.ranks.agree(plan.to_json())))
