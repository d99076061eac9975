"""What a search walks through: states, their plans and energies, and how one state becomes another."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.moves import Move

State = TypeVar("State")


class Space(ABC, Generic[State]):
    """States around one starting plan. A subclass says what a state is."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    @abstractmethod
    def candidate(self, state: State) -> Candidate:
        """Plan and policy of a state."""

    @abstractmethod
    def neighbour(self, state: State, draw: random.Random) -> State:
        """A state that differs from this one by an exchange; this one itself where there is nothing to exchange."""

    def energy(self, state: State, limit: float = float("inf")) -> float | None:
        """The state's energy, nats, if it is below `limit`, else None."""
        candidate = self.candidate(state)
        return self.evaluator.energy_below(candidate.plan, limit, candidate.policy)

    def rebase(self, state: State) -> None:
        """Make this state the one whose neighbours are cheap."""
        candidate = self.candidate(state)
        self.evaluator.rebase(candidate.plan, candidate.policy)

    def best(
        self, states: list[State], key: Callable[[int, float], float] = lambda index, energy: energy
    ) -> tuple[int, float]:
        """The index of the best of some states, and its energy."""
        return self.evaluator.best([self.candidate(state) for state in states], key=key)


def fits(move: Move, others: Iterable[Move]) -> bool:
    """Whether a move can be made beside others: in no stage is a block part of two removals."""
    return not any(_meets(move, other) and set(move.run) & set(other.run) for other in others)


def _meets(one: Move, other: Move) -> bool:
    return "both" in (one.target, other.target) or one.target == other.target
