"""Narrower blocks: MLP channels or query heads leave every block, at the costs of another row."""

from __future__ import annotations

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method, ReadsTrainingText
from pdtrim_pl.criteria import WidthCriterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Part, Relation
from pdtrim_pl.search import Narrowing, narrow
from pdtrim_pl.search.width_levels import units_to_meet


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

    Raises:
        UserError: `first` starts from another method, or `first_share` is not between 0 and 1.
    """

    def __init__(
        self, start: str, criterion: WidthCriterion, part: Part = "channels", repair_tokens: int = 0,
        relation: Relation = "nested", first: Method | None = None, first_share: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(start, repair_tokens)
        if first is not None and first.start is not None:
            raise UserError(f"`first` starts from {first.start!r}: give a method that starts from the full model.")
        if not 0 < first_share < 1:
            raise UserError(f"`first_share` is {first_share}: give a share of the blocks, between 0 and 1.")
        self.criterion, self.part, self.relation = criterion, part, relation
        self.first, self.first_share = first, first_share

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
        units = max(units_to_meet(bench.costs, student.plan, stage, self.part, target) for stage in STAGES)
        if units == 0:  # the dropped blocks meet the costs already
            return begun
        text, tokens = bench.refitting_text(self.tokens, skip=begun.trained_tokens)
        narrowing = Narrowing("both", self.part, units, self.criterion, repair=self.tokens > 0)
        found = narrow(bench.context(student), student.plan, narrowing, text)
        student.apply_plan(found.plan, refits=found.refits)
        return Found(found.plan, None, bench.changed(student), begun.trained_tokens + tokens)
