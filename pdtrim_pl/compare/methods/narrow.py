"""Narrower blocks: MLP channels or query heads leave every block, at the costs of another row."""

from __future__ import annotations

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import ReadsTrainingText
from pdtrim_pl.criteria import WidthCriterion
from pdtrim_pl.plan import STAGES, Part, Relation
from pdtrim_pl.search import Narrowing, narrow
from pdtrim_pl.search.width_levels import units_to_meet


class Narrow(ReadsTrainingText):
    """Removes the same number of channels or query heads from every block of both stages, and no block.

    It removes as many as are needed for the costs of another method's result.

    Args:
        start: name of the other method. Only the costs of its result count.
        criterion: measures the harm of removing a channel or head.
        part: channels or query heads.
        repair_tokens: tokens of training text on which the criterion measures and the layers that read the units are
            refitted. They come out of the budget of a training that follows. 0 refits nothing, and the criterion
            measures on the calibration set.
        relation: how the blocks of the two stages relate.
    """

    def __init__(
        self, start: str, criterion: WidthCriterion, part: Part = "channels", repair_tokens: int = 0,
        relation: Relation = "nested",
    ) -> None:  # fmt: skip
        super().__init__(start, repair_tokens)
        self.criterion, self.part, self.relation = criterion, part, relation

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        target = bench.target_of(start)
        student = bench.student(Found(bench.full(self.relation, start.plan.boundary)), dtype="float32")
        units = max(units_to_meet(bench.costs, student.plan, stage, self.part, target) for stage in STAGES)
        text, tokens = bench.refitting_text(self.tokens)
        narrowing = Narrowing("both", self.part, units, self.criterion, repair=self.tokens > 0)
        found = narrow(bench.context(student), student.plan, narrowing, text)
        student.apply_plan(found.plan, refits=found.refits)
        return Found(found.plan, None, bench.changed(student), tokens)
