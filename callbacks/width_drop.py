"""Takes MLP channels or query heads from every block of a stage between distillation epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.removal_rounds import RemovalRounds, calibration_batches, fitting_batches, scoring_context
from pdtrim_pl.criteria import ActivationTimesWeight, WidthCriterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.export.sliced import narrowed_config
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import Part, StagePlan, Target
from pdtrim_pl.search import Guards, Narrowing, check_units, narrow
from pdtrim_pl.strategies import check_refits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """How last layers are refitted by least squares on what is left to them."""

    examples: int = 128
    """Training examples to score and to refit on, a quarter of them held back to judge by. A layer wants several tokens
    for each of its inputs."""
    tied: bool = False
    """Refit only layers that all their stages lose the same of. Otherwise a block that loses channels in one stage
    alone gets weights of its own there."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"`repair.examples` is {self.examples}: give at least 1.")


class WidthDrop(RemovalRounds):
    """Takes the channels or query heads that hurt least from every block of a stage, equally many from each.

    So an export has one `intermediate_size` and one `num_attention_heads` a stage. Use one instance per stage and part;
    they run in the order of the list. Blocks are narrowed one after another, each on what the ones before it make of
    the text by then.

    Args:
        stage: `prefill`, `decode`, or `both`. Under `relation: nested`, what prefill loses, decode loses too; prefill
            first loses what decode has lost already.
        schedule: {epoch: how many leave every block, or which share of the whole block's}. Epochs count from 0.
        part: `channels` of the MLP, or query `heads`: every key/value head loses equally many.
        criterion: measures how much it hurts to lose one.
        repair: refit the layers behind them; null does not, and scores on the calibration prompts.

    Raises:
        UserError: a schedule with a negative epoch, or without a count of at least 1 or a share in (0, 1).
    """

    def __init__(
        self,
        stage: Target,
        schedule: dict[int, int | float],
        part: Part = "channels",
        criterion: WidthCriterion | None = None,
        repair: Repair | None = Repair(),
    ) -> None:
        self.stage, self.part, self.repair = stage, part, repair
        self.criterion = criterion or ActivationTimesWeight()
        # A saved configuration gives the epochs back as strings.
        asked: Mapping[Any, int | float] = schedule
        self.schedule = {int(epoch): count for epoch, count in asked.items()}
        sound = all(count >= 1 if isinstance(count, int) else 0 < count < 1 for count in self.schedule.values())
        if not self.schedule or min(self.schedule) < 0 or not sound:
            raise UserError(
                f"`schedule` of the {stage} {part} is {schedule}: give epochs >= 0, and counts >= 1 or shares between "
                "0 and 1."
            )
        super().__init__(f"{stage} {part}", self.schedule, Guards(), None, SearchMemory())

    @property
    @override
    def state_key(self) -> str:
        return f"WidthDrop[{self.stage},{self.part}]"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.repair is not None:
            check_refits(trainer.strategy, self.repair.tied)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the whole schedule on the plan, so that what cannot be exported is refused before the first step."""
        assert isinstance(pl_module, PDTrimModule)
        student, plan = pl_module.student, pl_module.plan
        due = [epoch for epoch in self.epochs if epoch not in self.done]
        if not due:
            return
        total = sum(self._count(plan, self.schedule[epoch]) for epoch in due)
        cut = check_units(student.architecture.cuts.get(self.part), plan, self._narrowing(plan, total, 0))
        units = plan.model.sizes[self.part]
        assert units is not None
        left = units - sum(self._count(plan, count) for count in self.schedule.values())
        narrowed_config(student.model.config, {self.part: cut}, {self.part: left}, student.kv_shape.head_dim)

    def _count(self, plan: StagePlan, asked: int | float) -> int:
        """How many units leave every block; a share of heads is rounded so that every key/value head loses as many."""
        units = plan.model.sizes[self.part]
        if isinstance(asked, int) or units is None:
            return int(asked)
        each = (plan.model.kv_heads or 1) if self.part == "heads" else 1
        return max(1, round(asked * units / each)) * each

    def _narrowing(self, plan: StagePlan, count: int, round: int) -> Narrowing:
        tied = self.repair is not None and self.repair.tied
        return Narrowing(self.stage, self.part, count, self.criterion, self.repair is not None, tied, round)

    @override
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        asked = self._narrowing(module.plan, self._count(module.plan, self.schedule[self.epochs[round]]), round)
        log.info(
            "Round %d: taking %d %s from every block of %s by %s.",
            round, asked.count, self.part, self.stage, self.criterion.name,
        )  # fmt: skip
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            found = narrow(context, module.plan, asked, self._text(trainer))
        module.apply_plan(found.plan, found.refits)

    def _text(self, trainer: Trainer) -> list[Any]:
        if self.repair is None:
            return calibration_batches(trainer)
        examples = self.repair.examples
        text = fitting_batches(trainer, lambda size: max(2, ceil(examples / size)))  # one is held back
        if len(text) < 2:
            log.warning(
                "`repair` refits no layer: there is one batch of training text, and a second one would have to judge "
                "the refits. Lower `eval_batch_size` of the data."
            )
        return text
