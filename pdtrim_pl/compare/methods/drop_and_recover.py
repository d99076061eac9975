"""IteRABRe: drop one block, recover by distillation, repeat."""

from __future__ import annotations

import torch
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method
from pdtrim_pl.criteria import Criterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Boundary, Relation, Target
from pdtrim_pl.search.choose import choose_drops


class DropAndRecover(Method):
    """Drops `at_once` blocks, distils the student, and repeats until `count` blocks are gone.

    Every round scores the distilled student. The token budget is divided evenly among the rounds. IteRABRe drops one
    block a round and has one plan for both stages.

    Args:
        criterion: measures the harm of a drop.
        at_once: number of blocks that a round drops.
        relation: how the blocks of the two stages relate.
        target: the stage(s) that lose the blocks.
        boundary: which stage handles the prompt's last token.

    Raises:
        UserError: `at_once` is below 1.
    """

    def __init__(
        self, criterion: Criterion, at_once: int = 1, relation: Relation = "unified", target: Target = "both",
        boundary: Boundary = "prefill",
    ) -> None:  # fmt: skip
        super().__init__()
        if at_once < 1:
            raise UserError(f"`at_once` is {at_once}: give at least 1 block a round.")
        self.criterion, self.at_once, self.relation, self.target = criterion, at_once, relation, target
        self.boundary = boundary

    @property
    @override
    def trains(self) -> bool:
        return True

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        found = Found(bench.full(self.relation, self.boundary))
        rounds = -(-count // self.at_once)
        for index in range(rounds):
            drops = min(self.at_once, count - index * self.at_once)
            context = bench.context(bench.student(found))
            with torch.no_grad():
                plan = choose_drops(
                    self.criterion, context, found.plan, self.target, drops, round=index, guards=bench.guards
                )
            found = bench.distil(found.under(plan), bench.training.tokens // rounds)
        return found
