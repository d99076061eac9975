"""Drops and merges blocks of one stage between distillation epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from callbacks.removal_rounds import RemovalRounds, scoring_context
from pdtrim_pl.criteria import Criterion, ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import WITH_KV_ONLY, Stage, StagePlan, Target
from pdtrim_pl.search import Annealing, Guards, RoundSearch, anneal, choose_drops
from pdtrim_pl.search.rounds import Removals
from pdtrim_pl.sizing.callback_load import CallbackLoad
from pdtrim_pl.strategies import check_kv_refits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepeatedDrop:
    """`blocks` blocks every `every` epochs, from epoch `start`, until `until` blocks are gone from the stage."""

    blocks: int
    every: int
    until: int
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.blocks, self.every, self.until) < 1 or self.start < 0:
            raise UserError(f"`schedule` needs `blocks`, `every`, `until` of at least 1 and `start` >= 0, got {self}.")

    def by_epoch(self) -> dict[int, int]:
        """The same schedule as {epoch: blocks}."""
        rounds = ceil(self.until / self.blocks)
        return {
            self.start + index * self.every: min(self.blocks, self.until - index * self.blocks)
            for index in range(rounds)
        }


class BlockDrop(RemovalRounds):
    """Removes the blocks that hurt least, at the start of the scheduled epochs.

    Use one instance per stage; they run in the order of the list. `search_journal.jsonl` beside the checkpoints keeps
    all evaluations, so a continued search repeats none.

    Args:
        stage: `prefill`, `decode`, or `both` (the only choice under `relation: unified`).
        criterion: measures how much it hurts to drop a block.
        schedule: {epoch: blocks}, or `blocks`, `every`, `until` and `start` of a repeated drop. Epochs count from 0.
        guards: blocks that must stay, and a cap.
        annealing: improve the choice by simulated annealing on KL to the teacher; null does not.
        merging: offer merges beside plain drops: one block, fitted to two neighbours, stands for both. A round then
            chooses by KL to the teacher, whatever the criterion.
        memory: how much a search may keep on the models' device.
        refit_examples: number of training examples on which the projections of KV-only blocks are refitted: blocks that
            prefill has dropped and decode runs, under `relation: prefill_only` or `free`. 0 refits nothing.

    Raises:
        UserError: a schedule with a negative epoch or a count below 1, or a number of examples that is
            negative or for another stage than prefill.
    """

    def __init__(
        self,
        stage: Target,
        criterion: Criterion,
        schedule: dict[int, int] | RepeatedDrop,
        guards: Guards = Guards(),
        annealing: Annealing | None = None,
        merging: Merging | None = None,
        memory: SearchMemory = SearchMemory(),
        refit_examples: int = 0,
    ) -> None:
        self.stage = stage
        self.criterion = criterion
        # A saved configuration gives the epochs back as strings.
        asked: Mapping[Any, int] = schedule.by_epoch() if isinstance(schedule, RepeatedDrop) else schedule
        self.schedule = {int(epoch): int(count) for epoch, count in asked.items()}
        if not self.schedule or min(self.schedule) < 0 or min(self.schedule.values()) < 1:
            raise UserError(f"`schedule` of the {stage} drops is {schedule}: give epochs >= 0 and counts >= 1.")
        super().__init__(f"{stage} drops", self.schedule, guards, merging, memory)
        self.until = schedule.until if isinstance(schedule, RepeatedDrop) else None
        self.annealing = annealing
        if refit_examples < 0 or (refit_examples and stage != "prefill"):
            raise UserError(
                f"`refit_examples` of the {stage} drops is {refit_examples}: give 0 or more, and only where the stage "
                "is `prefill`. Other drops leave no block of which prefill only makes keys and values."
            )
        self.refit_examples = refit_examples

    @property
    @override
    def state_key(self) -> str:
        return f"BlockDrop[{self.stage}]"

    @property
    def _counted(self) -> Stage:
        """The stage whose blocks are counted. With `both`, the two stages lose the same blocks."""
        return "decode" if self.stage == "decode" else "prefill"

    @override
    def load(self) -> CallbackLoad:
        load, gone = super().load(), sum(self.schedule.values())
        if self.stage != "both" and self.merging is not None and not self.merging.tied:
            load = replace(load, untied={self.stage: gone})
        return replace(
            load, writes_weights=load.writes_weights or self.refit_examples > 0,
            prefill_drops=gone if self.stage == "prefill" else 0, refits_kv_only=self.refit_examples > 0,
        )  # fmt: skip

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.refit_examples:
            check_kv_refits(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        plan = pl_module.plan
        if self.refit_examples and plan.relation not in WITH_KV_ONLY:
            raise MisconfigurationException(
                f"`refit_examples` of the {self.title} refits keys and values of blocks that prefill alone has lost, "
                f"and under `relation: {plan.relation}` there are none. Leave it out, or use `prefill_only` or `free`."
            )
        left = len(plan.drop_candidates(self.stage, self.guards.protect_first, self.guards.protect_last))
        asked = sum(count for epoch, count in self.schedule.items() if epoch not in self.done)
        if self._due(plan, asked) > left:
            raise MisconfigurationException(
                f"`schedule` of the {self.stage} drops asks for {asked} blocks, and only {left} may leave under "
                f"`guards` {self.guards}. Lower the counts, or loosen `guards`."
            )

    def _due(self, plan: StagePlan, asked: int) -> int:
        """How many blocks a round drops. `until` counts all removed blocks, whatever removed them."""
        return asked if self.until is None else max(0, min(asked, self.until - len(plan.removed(self._counted))))

    @override
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        count = self._due(module.plan, self.schedule[self.epochs[round]])
        if not count:
            return
        log.info("Round %d: choosing %d block(s) to drop from %s by %s.", round, count, self.stage, self.criterion.name)
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            plan = self._chosen(trainer, context, module.plan, count, round)
        module.apply_plan(StagePlan.from_json(context.ranks.agree(plan.to_json())))
        if self.refit_examples:
            self.refit_kv_only(trainer, module, self.refit_examples)

    def _chosen(self, trainer: Trainer, context: ScoringContext, start: StagePlan, count: int, round: int) -> StagePlan:
        if self.merging is None:
            plan = choose_drops(self.criterion, context, start, self.stage, count, round=round, guards=self.guards)
            if self.annealing is None:
                return plan
            search = RoundSearch(context.evaluator, start, self.stage, count, self.guards)
            dropped = set(start.blocks(self._counted)) - set(plan.blocks(self._counted))
            return self._annealed(search, search.drops(sorted(dropped)), self.annealing, context, round)
        offered = self.merges(trainer, context, start, self.stage)
        search = RoundSearch(context.evaluator, start, self.stage, count, self.guards, offered, self.merging)
        first, energy = search.greedy(lazy=True, progress=context.progress)
        if self.annealing is None:
            return search.final(first, round, "greedy_kl", energy)
        return self._annealed(search, first, self.annealing, context, round)

    def _annealed(
        self, search: RoundSearch, first: Removals, settings: Annealing, context: ScoringContext, round: int
    ) -> StagePlan:
        best, energy = anneal(search, first, settings, context.progress)
        return search.final(best, round, "annealing", energy)
