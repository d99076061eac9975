"""Takes MLP channels or query heads from every block of a stage between distillation epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.removal_rounds import WITHOUT_TEACHER, RemovalRounds, refitting_batches, scoring_context
from pdtrim_pl.criteria import ActivationTimesWeight, WidthCriterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.export.sliced import narrowed_config
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import Part, Stage, StagePlan, Target
from pdtrim_pl.search import Guards, Narrowing, check_units, narrow
from pdtrim_pl.search.stacked import check_together
from pdtrim_pl.sizing.callback_load import EVERY_BLOCK, CallbackLoad
from pdtrim_pl.strategies import check_refits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """Settings of the refits by least squares: of the layers that read the removed channels or heads.

    Where prefill loses channels or heads, the projections of its KV-only blocks are refitted too, unless `tied`.
    """

    examples: int = 128
    """Number of training examples to score and to refit on. A quarter of them is held back to judge the refits. A layer
    needs several tokens for each of its inputs."""
    tied: bool = False
    """Refit a layer only if all stages that use it lose the same. Otherwise a block that is narrowed in one stage alone
    gets weights of its own in this stage."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"`repair.examples` is {self.examples}: give at least 1.")


class WidthDrop(RemovalRounds):
    """Removes the MLP channels or query heads that hurt least, the same number from every block of a stage.

    So an export has one `intermediate_size` and one `num_attention_heads` for each stage. Use one instance for each
    stage and part; they run in the order of the list. Blocks are narrowed from the first to the last. The blocks before
    it are already narrowed and refitted when a block is measured.

    Args:
        stage: `prefill`, `decode`, or `both`; `both` narrows a block that one stage has dropped in the other. Under
            `relation: nested`, decode also loses what prefill loses. Prefill first loses what decode has already lost.
        schedule: {epoch: number, or share of the whole block's, to remove from every block}. Epochs count from 0.
        part: `channels` of the MLP, or query `heads`. Every key/value head loses the same number of query heads.
        criterion: measures how much it hurts to remove one.
        repair: settings of the refits of the layers that read what is removed. null: nothing is refitted, and the
            criterion measures on the calibration set instead of training examples.

    Raises:
        UserError: the schedule has a negative epoch, or a value that is neither a count of at least 1 nor a share in
            (0, 1).
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
        read: Mapping[Any, int | float] = schedule  # a saved configuration has the epochs as strings
        self.schedule = {int(epoch): count for epoch, count in read.items()}
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
    def load(self) -> CallbackLoad:
        untied: dict[Stage, int] = {}
        if self.stage != "both" and self._unties:
            untied[self.stage] = EVERY_BLOCK
        return CallbackLoad(
            narrowed_on=0 if self.repair is None else self.repair.examples, without_teacher=WITHOUT_TEACHER,
            writes_weights=self.repair is not None, untied=untied, refits_kv_only=self._refits_kv_only,
        )  # fmt: skip

    @property
    def _unties(self) -> bool:
        """Whether a stage that loses alone gets weights of its own."""
        return self.repair is not None and not self.repair.tied

    @property
    def _refits_kv_only(self) -> bool:
        return self._unties and self.stage != "decode"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.repair is not None:
            check_refits(trainer.strategy, self.repair.tied)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the whole schedule against the plan, so that an impossible one is refused before the first step."""
        assert isinstance(pl_module, PDTrimModule)
        student, plan = pl_module.student, pl_module.plan
        due = [epoch for epoch in self.epochs if epoch not in self.done]
        if not due:
            return
        total = sum(self._count(plan, self.schedule[epoch]) for epoch in due)
        cut = check_units(student.architecture.cuts.get(self.part), plan, self._narrowing(plan, total, 0))
        for left in set(self._left_by_all(trainer, plan).values()):
            narrowed_config(student.model.config, {self.part: cut}, {self.part: left}, student.kv_shape.head_dim)

    def _left_by_all(self, trainer: Trainer, plan: StagePlan) -> dict[Stage, int]:
        """Number of units that each stage keeps after all drops of this part."""
        drops = [one for one in trainer.callbacks if isinstance(one, WidthDrop) and one.part == self.part]  # type: ignore[attr-defined]
        due = [(epoch, place) for place, one in enumerate(drops) for epoch in one.schedule if epoch not in one.done]
        return check_together(
            plan, [drops[p]._narrowing(plan, drops[p]._count(plan, drops[p].schedule[e]), 0) for e, p in sorted(due)]
        )

    def _count(self, plan: StagePlan, wanted: int | float) -> int:
        """Number of units to remove from every block. A share of heads is rounded to whole key/value groups."""
        units = plan.model.sizes[self.part]
        if isinstance(wanted, int) or units is None:
            return int(wanted)
        each = plan.model.groups(self.part)
        return max(1, round(wanted * units / each)) * each

    def _narrowing(self, plan: StagePlan, count: int, round: int) -> Narrowing:
        tied = self.repair is not None and self.repair.tied
        return Narrowing(self.stage, self.part, count, self.criterion, self.repair is not None, tied, round)

    @override
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        narrowing = self._narrowing(module.plan, self._count(module.plan, self.schedule[self.epochs[round]]), round)
        log.info(
            "Round %d: taking %d %s from every block of %s by %s.",
            round, narrowing.count, self.part, self.stage, self.criterion.name,
        )  # fmt: skip
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            result = narrow(context, module.plan, narrowing, self._text(trainer))
        module.apply_plan(result.plan, result.refits)
        if self.repair is not None and self._refits_kv_only:
            self.refit_kv_only(trainer, module, self.repair.examples)

    def _text(self, trainer: Trainer) -> list[Any]:
        text = refitting_batches(trainer, 0 if self.repair is None else self.repair.examples)
        if self.repair is not None and len(text) < 2:
            log.warning(
                "`repair` refits no layer: there is one batch of training text, and a second one would have to judge "
                "the refits. Lower `eval_batch_size` of the data."
            )
        return text
