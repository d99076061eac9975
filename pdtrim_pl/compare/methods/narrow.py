"""Narrower blocks: MLP channels or query heads leave every block, at the costs of another row."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method, ReadsTrainingText
from pdtrim_pl.criteria import WidthCriterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Part, Relation, Stage, StagePlan, Target
from pdtrim_pl.search import Narrowing, narrow, refit_kv_only
from pdtrim_pl.search.width_levels import units_to_meet
from pdtrim_pl.sizing.cost import CostModel


class Narrow(ReadsTrainingText):
    """Removes the same number of channels or query heads from every block of both stages.

    It removes as many as are needed for the costs of another method's result. FLOPs of prefill and bytes of a decode
    step count, bytes on the wire do not: a policy saves those.

    Args:
        start: name of the other method. Only the costs of its result count.
        criterion: measures the harm of removing a channel or head.
        part: channels or query heads.
        repair_tokens: tokens of training text on which the criterion measures and the layers that read the units are
            refitted. They come out of the budget of a training that follows. 0 refits nothing, and the criterion
            measures on the calibration set.
        relation: how the blocks of the two stages relate, if no block leaves first.
        first: a method that removes whole blocks before. Null removes none.
        first_share: share of a row's count that it removes; the widths have to save the rest.
        last_blocks: prefill keeps its width, and its last blocks only make keys and values, as many as the costs need;
            with `repair_tokens` their projections are refitted. Only decode is narrowed. The relation is then `free`,
            and decode handles the last token of the prompt.

    Raises:
        UserError: `first` starts from another method, or `first_share` is not between 0 and 1.
    """

    def __init__(
        self, start: str, criterion: WidthCriterion, part: Part = "channels", repair_tokens: int = 0,
        relation: Relation = "nested", first: Method | None = None, first_share: float = 0.5,
        last_blocks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(start, repair_tokens)
        if first is not None and first.start is not None:
            raise UserError(f"`first` starts from {first.start!r}: give a method that starts from the full model.")
        if not 0 < first_share < 1:
            raise UserError(f"`first_share` is {first_share}: give a share of the blocks, between 0 and 1.")
        self.criterion, self.part, self.relation = criterion, part, relation
        self.first, self.first_share, self.last_blocks = first, first_share, last_blocks

    @property
    @override
    def trains(self) -> bool:
        return super().trains or (self.first is not None and self.first.trains)

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        target = bench.target_of(start)
        if self.first is None:
            begun = Found(bench.full(self.relation, start.plan.boundary))
        else:
            begun = self.first.find(bench, None, max(1, round(self.first_share * count)))
        student = bench.student(begun, dtype="float32")
        if self.last_blocks:
            student.apply_plan(_without_last(bench.costs, student.plan, target.prefill_flops))
        stages: tuple[Stage, ...] = ("decode",) if self.last_blocks else STAGES
        units = max(units_to_meet(bench.costs, student.plan, stage, self.part, target) for stage in stages)
        if units == 0 and student.plan == begun.plan:  # the dropped blocks meet the costs already
            return begun
        text, tokens = bench.refitting_text(self.tokens, skip=begun.trained_tokens)
        if units:
            target_stage: Target = "decode" if self.last_blocks else "both"
            narrowing = Narrowing(target_stage, self.part, units, self.criterion, repair=self.tokens > 0)
            found = narrow(bench.context(student), student.plan, narrowing, text)
            student.apply_plan(found.plan, refits=found.refits)
        if self.tokens:
            found = refit_kv_only(bench.context(student), text)
            student.apply_plan(found.plan, refits=found.refits)
        return Found(student.plan, None, bench.changed(student), begun.trained_tokens + tokens)


def _without_last(costs: CostModel, plan: StagePlan, prefill_flops: float) -> StagePlan:
    """The plan without so many of prefill's last blocks that prefill costs at most a share of its FLOPs."""
    plan = replace(plan, relation="free", boundary="decode")
    while costs.shares(plan).prefill_flops > prefill_flops and len(plan.prefill) > 1:
        plan = plan.drop("prefill", plan.prefill[-1], criterion="last_n")
    return plan
