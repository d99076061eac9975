"""What a search walks through: states, their plans and energies, and how one state becomes another."""

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
    "The KL to the teacher on the calibration set is not finite, of the plan that a search starts from or of all that "
    "it may choose. Check the model's weights, and use bfloat16 or float32 if they are float16."
)


class Space(ABC, Generic[State]):
    """States around one starting plan. A subclass says what a state is."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    @abstractmethod
    def candidate(self, state: State) -> Candidate:
        """Plan and policy of a state."""

    @abstractmethod
    def neighbour(self, state: State, draw: random.Random) -> State | None:
        """A state that differs from this one by an exchange; None where there is nothing to exchange."""

    @abstractmethod
    def improved(
        self, state: State, progress: Progress = lambda line: None, over: Callable[[], bool] = lambda: False
    ) -> tuple[State, float]:
        """A state that the space's own larger steps lead to from this one, and its energy; no worse than this one.

        Args:
            state: where to begin.
            progress: told how far it is.
            over: asked before a step whether to take it no more.
        """

    def energy(self, state: State, limit: float = inf) -> float | None:
        """The state's energy, nats, if it is below `limit`, else None."""
        candidate = self.candidate(state)
        return self.evaluator.energy_below(candidate.plan, limit, candidate.policy)

    def known_energy(self, state: State) -> float:
        """The state's energy, nats.

        Raises:
            UserError: it is not finite.
        """
        energy = self.energy(state)
        if energy is None:
            raise UserError(NOT_FINITE)
        return energy

    def rebase(self, state: State) -> None:
        """Make this state the one whose neighbours are cheap."""
        candidate = self.candidate(state)
        self.evaluator.rebase(candidate.plan, candidate.policy)

    def best(self, states: list[State], progress: Progress = lambda line: None) -> tuple[int, float]:
        """The index of the best of some states, and its energy."""
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
        plan: the plan before.
        moves: removals that fit each other. Merges are made first, for they need their neighbours to be there.
        merging: says which merged blocks get weights of their own.
        **facts: of the history, as of `StagePlan.drop`.
    """
    for move in sorted(moves, key=lambda move: move.into is None):
        plan = move.apply(plan, **facts) if move.into is None else merging.apply(plan, move, **facts)
    return plan


def fits(move: Move, others: Iterable[Move]) -> bool:
    """Whether a move can be made beside others: in no stage is a block part of two removals."""
    return not any(_meets(move, other) and set(move.run) & set(other.run) for other in others)


def _meets(one: Move, other: Move) -> bool:
    return "both" in (one.target, other.target) or one.target == other.target
