"""The states of one round: so many removals, drops or merges, from one target."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.moves import Move
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.space import Space, fits

Removals = tuple[Move, ...]
"""The removals of one round, in a fixed order."""


class RoundSearch(Space[Removals]):
    """Plans made from a round's first plan by `count` removals.

    Args:
        evaluator: the energy.
        start: the plan before the round.
        target: the stage(s) that lose blocks.
        count: removals of the round.
        guards: blocks that no removal may touch, and a cap.
        merges: the distillation set: merges that may be chosen beside drops.
        untied: whether merged blocks get weights of their own in the target.
    """

    def __init__(
        self, evaluator: Evaluator, start: StagePlan, target: Target, count: int, guards: Guards,
        merges: Sequence[Move] = (), untied: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(evaluator)
        self.start, self.target, self.count, self.untied = start, target, count, untied
        pool = start.candidates(target, guards.protect_first, guards.protect_last)
        if len(pool) < count:
            pool = start.drop_candidates(target, guards.protect_first, guards.protect_last)
        self.pool = [*(Move(target, (block,)) for block in pool), *merges]

    def candidate(self, state: Removals) -> Candidate:
        plan = self.start
        for move in _merges_first(state):
            plan = move.apply(plan, untied=self.untied)
        return self.evaluator.candidate(plan)

    def final(self, state: Removals, round: int, criterion: str, energy: float | None) -> StagePlan:
        """The plan of the state that a search returned, its history saying so."""
        plan = self.start
        for move in _merges_first(state):
            plan = move.apply(plan, untied=self.untied, round=round, criterion=criterion, score=energy)
        return plan

    def neighbour(self, state: Removals, draw: random.Random) -> Removals:
        out = draw.choice(state)
        rest = [move for move in state if move != out]
        left = [move for move in self.pool if move not in state and fits(move, rest)]
        return tuple(sorted([*rest, draw.choice(left)], key=_order)) if left else state

    def greedy(self) -> tuple[Removals, float]:
        """One removal after another, each the one of least energy.

        Raises:
            ValueError: fewer removals are possible than the round asks for.
        """
        state: Removals = ()
        energy = 0.0
        for taken in range(self.count):
            self.rebase(state)
            options = [tuple(sorted([*state, m], key=_order)) for m in self.pool if fits(m, state)]
            options = [option for option in options if self._runs(option)]
            if not options:
                raise ValueError(
                    f"Only {taken} of {self.count} removals can be made in `{self.target}` under the guards. Lower the "
                    "counts in `schedule`, or loosen `guards`."
                )
            index, energy = self.best(options)
            state = options[index]
        return state, energy

    def drops(self, blocks: Sequence[int]) -> Removals:
        """The state that drops these blocks."""
        return tuple(sorted((Move(self.target, (block,)) for block in blocks), key=_order))

    def _runs(self, state: Removals) -> bool:
        """Whether every stage keeps a block."""
        lost = sum(move.removed for move in state)
        stages = {stage for move in state for stage in self.start.stages_losing(self.target, move.run[0])}
        return all(len(self.start.blocks(stage)) > lost for stage in stages)


def _order(move: Move) -> tuple[tuple[int, ...], int]:
    return move.run, -1 if move.into is None else move.into


def _merges_first(state: Removals) -> list[Move]:
    """Merges need their neighbours to be there, drops do not."""
    return sorted(state, key=lambda move: move.into is None)
