"""A set of blocks chosen by a quadratic model of the loss (arXiv 2602.00161)."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import ReadsTrainingText
from pdtrim_pl.plan import Relation
from pdtrim_pl.search.quadratic import QuadraticModel


class Quadratic(ReadsTrainingText):
    """Drops the set of blocks with the least loss in a quadratic model, from both stages, without training.

    Args:
        relation: how the blocks of the two stages relate.
        tokens: tokens of training text to fit the model on. Nothing is trained on them. With 0, it is fitted on the
            calibration set, which has too few examples for the curvature of many blocks.
    """

    def __init__(self, relation: Relation = "unified", tokens: int = 60_000) -> None:
        super().__init__(None, tokens)
        self.relation = relation

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        plan, guards = bench.full(self.relation), bench.guards
        text, _ = bench.refitting_text(self.tokens)
        context = replace(bench.context(bench.student(Found(plan))), batches=text)
        candidates = plan.drop_candidates("both", guards.protect_first, guards.protect_last)
        blocks, change = QuadraticModel.fitted(context, plan, "both", candidates).least(count)
        for block in blocks:
            plan = plan.drop("both", block, criterion="quadratic", score=change)
        return Found(plan)
