"""The base class of searches: states, their plans and energies, and the steps from one state to another."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, Generic, TypeVar

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.merging.settings import Merging
from pdtrim_pl.plan import Move, StagePlan

State = TypeVar("State")
NOT_FINITE = (
    "The KL to the teacher on the calibration set is not finite, for the first plan of a search or for all candidates. "
    "Check the model's weights, and use bfloat16 or float32 if they are float16."
)


class Space(ABC, Generic[State]):
    """The states that a search can reach from one plan. A subclass defines what a state is."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    @abstractmethod
    def candidate(self, state: State) -> Candidate:
        """The plan and the policy of a state."""

    @abstractmethod
    def neighbour(self, state: State, draw: random.Random) -> State | None:
        """A random state that differs from this one by an exchange; None if no exchange is possible."""

    @abstractmethod
    def improved(
        self, state: State, progress: Progress = lambda line: None, over: Callable[[], bool] = lambda: False
    ) -> tuple[State, float]:
        """Descend from a state by larger steps than `neighbour`. Returns a state that is no worse, and its energy.

        Args:
            state: the first state.
            progress: called with lines on the progress of the search.
            over: called between steps; True ends the descent.
        """

    def energy(self, state: State, limit: float = inf) -> float | None:
        """The energy of a state in nats, if it is below `limit`; else None."""
        candidate = self.candidate(state)
        return self.evaluator.energy_below(candidate.plan, limit, candidate.policy)

    def known_energy(self, state: State) -> float:
        """The energy of a state in nats.

        Raises:
            UserError: the energy is not finite.
        """
        energy = self.energy(state)
        if energy is None:
            raise UserError(NOT_FINITE)
        return energy

    def rebase(self, state: State) -> None:
        """Make this state the base of the evaluator: states that differ little from it are then cheap to evaluate."""
        candidate = self.candidate(state)
        self.evaluator.rebase(candidate.plan, candidate.policy)

    def best(self, states: list[State], progress: Progress = lambda line: None) -> tuple[int, float]:
        """The index of the best of some states, and its energy in nats.

        Raises:
            UserError: no state has a finite energy.
        """
        index, energy = self.evaluator.best(
            [self.candidate(state) for state in states],
            progress=lambda done: progress(f"{len(states)} candidates, {done} batches evaluated"),
        )
        if energy == inf:
            raise UserError(NOT_FINITE)
        return index, energy


def after(plan: StagePlan, moves: Sequence[Move], merging: Merging, **facts: Any) -> StagePlan:
    """The plan after some removals.

    Args:
        plan: the plan before the removals.
        moves: removals that do not overlap. Merges are applied first, while their blocks are still neighbours.
        merging: decides which merged blocks get weights of their own.
        **facts: facts for the history, as in `StagePlan.drop`.
    """
    for move in sorted(moves, key=lambda move: move.into is None):
        plan = move.apply(plan, **facts) if move.into is None else merging.apply(plan, move, **facts)
    return plan


def fits(move: Move, others: Iterable[Move]) -> bool:
    """Whether a move overlaps with none of the others: in each stage, a block is part of at most one removal."""
    return not any(_meets(move, other) and set(move.run) & set(other.run) for other in others)


def _meets(one: Move, other: Move) -> bool:
    return "both" in (one.target, other.target) or one.target == other.target
