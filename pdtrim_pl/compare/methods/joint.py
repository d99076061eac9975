"""The joint search over the blocks of both stages, within the costs of another row."""

from __future__ import annotations

from dataclasses import asdict

import torch
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method, check_only_drops
from pdtrim_pl.search import Annealing, JointSearch, anneal
from pdtrim_pl.sizing.cost import CostTarget


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
        target = CostTarget(**asdict(bench.costs.shares(start.plan, start.policy)))
        student = bench.student(Found(bench.full("free", start.plan.boundary)))
        context = bench.context(student)
        with torch.no_grad():
            search = JointSearch(context.evaluator, student.plan, target, bench.costs, guards=bench.guards)
            state, energy = anneal(search, search.state_of(start.plan), self.annealing, context.progress)
            found = search.final(state, 0, energy)
        return Found(found.plan, found.policy)
