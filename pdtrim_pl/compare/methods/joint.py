"""The joint search over the blocks of both stages and their widths, within the costs of another row."""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method, ReadsTrainingText, check_only_drops
from pdtrim_pl.search import Annealing, JointSearch, WidthMoves, anneal, mixed


class Joint(Method):
    """Searches both stages together for the least KL, within the costs of another method's result.

    The search starts from the plan of the other method, which meets these costs.

    Args:
        start: name of the other method. Its plan must only drop blocks.
        annealing: settings of the annealing.
    """

    def __init__(self, start: str, annealing: Annealing = Annealing()) -> None:
        super().__init__(start)
        self.annealing = annealing

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        check_only_drops(start, self.start)
        target = bench.target_of(start)
        student = bench.student(Found(bench.full("free", start.plan.boundary)))
        context = bench.context(student)
        with torch.no_grad():
            search = JointSearch(context.evaluator, student.plan, target, bench.costs, guards=bench.guards)
            state, energy = anneal(search, search.state_of(start.plan), self.annealing, context.progress)
            found = search.final(state, 0, energy)
        return Found(found.plan, found.policy)


class Mixed(ReadsTrainingText):
    """Narrower blocks, fewer blocks or a mix of both: the one with the least KL within the costs of another method.

    FLOPs of prefill and bytes of a decode step count, bytes on the wire do not: a policy saves those.

    Args:
        start: name of the other method. Only the costs of its result count.
        width: the widths to try. `examples` is not used here.
        repair_tokens: tokens of training text on which the criterion measures and layers are refitted. They come out of
            the budget of a training that follows. 0 refits nothing, and the criterion measures on the calibration set.
        annealing: improves the best mix; null does not.
    """

    def __init__(
        self, start: str, width: WidthMoves = WidthMoves(), repair_tokens: int = 20_000,
        annealing: Annealing | None = None,
    ) -> None:  # fmt: skip
        super().__init__(start, repair_tokens)
        self.width, self.annealing = width, annealing

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        target = replace(bench.target_of(start), wire_bytes=1.0)
        student = bench.student(Found(bench.full("free", start.plan.boundary)), dtype="float32")
        text, tokens = bench.refitting_text(self.tokens)
        context = bench.context(student)
        with torch.no_grad():
            starts = mixed.starts(context, student.plan, self.width, bench.costs, target, text, repair=self.tokens > 0)
            searches = [
                JointSearch(context.evaluator, found.plan, target, bench.costs, guards=bench.guards) for found in starts
            ]
            index, state, energy = mixed.least(searches, context.progress)
            if self.annealing is not None:
                state, energy = anneal(searches[index], state, self.annealing, context.progress)
            plan = searches[index].final(state, 0, energy).plan
            student.apply_plan(plan, refits=mixed.refits_under(plan, starts[index].refits))
        return Found(plan, None, bench.changed(student), tokens)
