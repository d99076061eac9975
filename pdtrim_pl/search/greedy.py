"""Greedy search: make the best choice at every step, until a goal is reached."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.errors import UserError
from pdtrim_pl.search.space import NOT_FINITE, Space

State = TypeVar("State")


@dataclass(frozen=True)
class Option(Generic[State]):
    """One possible next choice of a greedy search."""

    choice: Hashable
    """Identifies the choice, independent of the choices before it."""
    state: State
    """The state after this choice."""
    gain: float = 1.0
    """How much nearer to the goal this choice leads. `LeastRise` divides the rise of energy by it."""


class Growth(Protocol[State]):
    """Defines a greedy search: its goal, and the possible choices at every state."""

    def reached(self, state: State) -> bool:
        """Whether the state reaches the goal."""

    def options(self, state: State) -> Sequence[Option[State]]:
        """The possible next choices."""

    def step(self, state: State, progress: Progress) -> Progress:
        """Called before every choice. Reports progress, and returns the function to which the choice reports."""


class Chooser(Protocol[State]):
    """Finds the best of some options."""

    def choose(
        self, state: State, options: Sequence[Option[State]], value: float, progress: Progress
    ) -> tuple[Option[State], float] | None:
        """The best option and its value; lower is better. None if no option is acceptable.

        Args:
            state: the state before the choice.
            options: the options, at least one.
            value: value of `state`.
            progress: called with lines on the progress of the choice.
        """


@dataclass(frozen=True)
class Grown(Generic[State]):
    """Result of a greedy search."""

    state: State
    value: float
    """Value of the last choice."""
    reached: bool
    """Whether the goal is reached. If not, no choice was left."""


def grow(
    growth: Growth[State], state: State, chooser: Chooser[State], value: float = 0.0,
    progress: Progress = lambda line: None,
) -> Grown[State]:  # fmt: skip
    """Make one choice after another, until the goal is reached or no choice is left.

    Args:
        growth: the goal and the possible choices.
        state: the first state.
        chooser: finds the best option at every step.
        value: value of the first state, for choosers that compare rises.
        progress: called with lines on the progress of the search.
    """
    while not growth.reached(state):
        options = growth.options(state)
        chosen = chooser.choose(state, options, value, growth.step(state, progress)) if options else None
        if chosen is None:
            return Grown(state, value, reached=False)
        option, value = chosen
        state = option.state
    return Grown(state, value, reached=True)


class LeastEnergy(Generic[State]):
    """Chooses the option of least energy. The evaluation of an option stops when it cannot be the best any more."""

    def __init__(self, space: Space[State]) -> None:
        self.space = space

    def choose(
        self, state: State, options: Sequence[Option[State]], value: float, progress: Progress
    ) -> tuple[Option[State], float]:
        """See `Chooser`."""
        self.space.rebase(state)
        index, energy = self.space.best([option.state for option in options], progress)
        return options[index], energy


class LeastRise(Generic[State]):
    """Chooses the option with the least rise of energy per gain. Only promising options are evaluated again.

    The rise of an option at an earlier step is taken as a lower bound of its rise now, as in the accelerated greedy
    algorithm of Minoux (1978). The bound may be wrong, since removals interact. Then the choice may not be the best.
    """

    def __init__(self, space: Space[State]) -> None:
        self.space = space
        self.known: dict[Hashable, float] = {}
        """Choice -> rise of energy per gain at its last evaluation."""

    def choose(
        self, state: State, options: Sequence[Option[State]], value: float, progress: Progress
    ) -> tuple[Option[State], float]:
        """See `Chooser`.

        Raises:
            UserError: no option has a finite energy.
        """
        self.space.rebase(state)
        best: tuple[Option[State], float] | None = None
        least = inf
        for looked, option in enumerate(sorted(options, key=lambda option: self.known.get(option.choice, -inf))):
            progress(f"energy {value:.4f}, {looked} of {len(options)} candidates looked at")
            if self.known.get(option.choice, -inf) >= least:
                break
            found = self.space.energy(option.state, value + least * option.gain)
            rise = least if found is None else (found - value) / option.gain
            self.known[option.choice] = rise
            if found is not None and rise < least:
                best, least = (option, found), rise
        if best is None:
            raise UserError(NOT_FINITE)
        return best
