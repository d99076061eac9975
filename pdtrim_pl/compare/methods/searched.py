"""The search of PDTrim: drops and merges in one round, improved by simulated annealing."""

from __future__ import annotations

import torch
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method, check_only_drops
from pdtrim_pl.merging import Merging
from pdtrim_pl.plan import Relation
from pdtrim_pl.search import Annealing, RoundSearch, anneal
from pdtrim_pl.search.rounds import Removals


class Annealed(Method):
    """Simulated annealing over the removals of both stages, starting from the drops of another method.

    Args:
        start: name of the other method. Its plan must only drop blocks, the same ones in both stages.
        annealing: settings of the annealing.
        merging: settings of merges, which are offered besides drops; null only drops.
        relation: how the blocks of the two stages relate.
    """

    def __init__(
        self, start: str, annealing: Annealing = Annealing(), merging: Merging | None = None,
        relation: Relation = "nested",
    ) -> None:  # fmt: skip
        super().__init__(start)
        self.annealing, self.merging, self.relation = annealing, merging, relation

    @property
    @override
    def trains(self) -> bool:
        return self.merging is not None

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        check_only_drops(start, self.start)
        student = bench.student(Found(bench.full(self.relation)))
        fitted = None if self.merging is None else bench.fit_pairs(student, self.merging)
        merges = [] if fitted is None else [run.move for run in fitted.accepted]
        context = bench.context(student)
        with torch.no_grad():
            search = RoundSearch(
                context.evaluator, student.plan, "both", count, bench.guards, merges=merges, merging=self.merging
            )
            state = search.drops(start.plan.removed("prefill"))
            if merges:
                state = _better(search, state, search.greedy(lazy=True, progress=context.progress)[0])
            state, energy = anneal(search, state, self.annealing, context.progress)
            plan = search.final(state, 0, "annealing", energy)
            student.apply_plan(plan)
        blocks = sum(len(run.move.run) for run in fitted.runs) if fitted is not None else 0
        tokens = fitted.tokens // blocks if fitted is not None and blocks else 0
        return Found(plan, None, bench.changed(student), tokens)


def _better(search: RoundSearch, one: Removals, other: Removals) -> Removals:
    return one if search.known_energy(one) <= search.known_energy(other) else other
