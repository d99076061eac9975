"""The search of one round: a state is a number of removals (drops or merges) from one target."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.merging.settings import Merging
from pdtrim_pl.plan import STAGES, Move, StagePlan, Target
from pdtrim_pl.search.choose import warn_if_deep
from pdtrim_pl.search.greedy import LeastEnergy, LeastRise, Option, grow
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.space import Space, after, fits

Removals = tuple[Move, ...]
"""The removals of one round, in the order of `order`."""


class RoundSearch(Space[Removals]):
    """Searches for the best `count` removals from the plan before a round.

    Args:
        evaluator: measures the energy.
        start: the plan before the round.
        target: the stage(s) that lose blocks.
        count: number of removals of the round.
        guards: limits on removals.
        merges: merges that may be chosen, besides drops (the distillation set).
        merging: settings with which they were fitted.
    """

    def __init__(
        self, evaluator: Evaluator, start: StagePlan, target: Target, count: int, guards: Guards,
        merges: Sequence[Move] = (), merging: Merging | None = None,
    ) -> None:  # fmt: skip
        super().__init__(evaluator)
        self.start, self.target, self.count, self.merging = start, target, count, merging or Merging()
        self.guards = guards
        pool = start.candidates(target, guards.protect_first, guards.protect_last)
        if len(pool) < count:
            pool = start.drop_candidates(target, guards.protect_first, guards.protect_last)
        self.pool = [*(Move(target, (block,)) for block in pool), *merges]

    def candidate(self, state: Removals) -> Candidate:
        return self.evaluator.candidate(after(self.start, state, self.merging))

    def final(self, state: Removals, round: int, criterion: str, energy: float | None) -> StagePlan:
        """The plan of the state that a search returned. Its history records round, criterion and energy."""
        plan = after(self.start, state, self.merging, round=round, criterion=criterion, score=energy)
        warn_if_deep(plan)
        return plan

    def neighbour(self, state: Removals, draw: random.Random) -> Removals | None:
        left = list(state)
        while left:
            out = draw.choice(left)
            others = self._exchanges(state, out)
            if others:
                return draw.choice(others)
            left.remove(out)  # the guards or the relation allow no other removal in its place
        return None

    def improved(
        self, state: Removals, progress: Progress = lambda line: None, over: Callable[[], bool] = lambda: False
    ) -> tuple[Removals, float]:
        """Exchange each removal in turn for the best other one, until no exchange lowers the energy or time is over."""
        energy, turn, idle = self.known_energy(state), 0, 0
        while idle < len(state) and not over():
            out = state[turn % len(state)]
            progress(f"exchanging {turn + 1}: energy {energy:.4f}, {idle} of {len(state)} removals stay")
            self.rebase(tuple(move for move in state if move != out))
            # The present state competes too. Its energy is known, so the others stop as soon as they exceed it.
            options = [state, *self._exchanges(state, out)]
            chosen, energy = self.best(options)
            turn, idle, state = turn + 1, 0 if chosen else idle + 1, options[chosen]
        return state, energy

    def _exchanges(self, state: Removals, out: Move) -> list[Removals]:
        """The states with another removal in place of `out`."""
        rest = [move for move in state if move != out]
        left = [move for move in self.pool if move not in state and fits(move, rest)]
        others = [tuple(sorted([*rest, move], key=order)) for move in left]
        return [other for other in others if self._allowed(other)]

    def greedy(self, lazy: bool = False, progress: Progress = lambda line: None) -> tuple[Removals, float]:
        """Greedy search: the next removal is the one with the least energy.

        Args:
            lazy: evaluate only candidates again that were good before; see `LeastRise`.
            progress: called with lines on the progress of the search.

        Raises:
            UserError: fewer removals are possible than the round asks for.
        """
        if lazy:
            grown = grow(self, (), LeastRise(self), self.evaluator.energy(self.start), progress)
        else:
            grown = grow(self, (), LeastEnergy(self), progress=progress)
        if not grown.reached:
            raise UserError(
                f"Only {len(grown.state)} of {self.count} removals can be made in `{self.target}` under the guards. "
                "Lower the counts in `schedule`, or loosen `guards`."
            )
        return grown.state, grown.value

    def reached(self, state: Removals) -> bool:
        """Whether the state has as many removals as the round asks for."""
        return len(state) == self.count

    def options(self, state: Removals) -> list[Option[Removals]]:
        """The states with one more removal that the guards allow."""
        options = [Option(m, tuple(sorted([*state, m], key=order))) for m in self.pool if fits(m, state)]
        return [option for option in options if self._allowed(option.state)]

    def step(self, state: Removals, progress: Progress) -> Progress:
        """See `Growth`."""
        return partial(_step, progress, len(state) + 1, self.count)

    def drops(self, blocks: Sequence[int]) -> Removals:
        """The state that drops these blocks."""
        return tuple(sorted((Move(self.target, (block,)) for block in blocks), key=order))

    def _allowed(self, state: Removals) -> bool:
        """Whether every stage keeps at least one block and loses no more than `max_removed`."""
        gone = [block for move in state for block in move.run if block != move.into]
        cap, blocks = self.guards.max_removed, self.start.model.num_blocks
        for stage in STAGES:
            lost = sum(stage in self.start.stages_losing(self.target, block) for block in gone)
            left = len(self.start.blocks(stage)) - lost
            if lost and (left < 1 or (cap is not None and blocks - left > cap)):
                return False
        return True


def _step(progress: Progress, step: int, steps: int, line: str) -> None:
    progress(f"removal {step} of {steps}: {line}")


def order(move: Move) -> tuple[tuple[int, ...], int]:
    """Sort key of the moves of a state."""
    return move.run, -1 if move.into is None else move.into
