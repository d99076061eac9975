"""Greedy search: one choice after another, always the best one, until a goal is reached."""

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
    """One choice that a greedy search may make next."""

    choice: Hashable
    """Names it, whatever was chosen before."""
    state: State
    """What it leads to."""
    gain: float = 1.0
    """What it brings nearer; the rise of energy is divided by it."""


class Growth(Protocol[State]):
    """How states grow, choice by choice, towards a goal."""

    def reached(self, state: State) -> bool:
        """Whether the goal is reached."""

    def options(self, state: State) -> Sequence[Option[State]]:
        """What may be chosen next."""

    def step(self, state: State, progress: Progress) -> Progress:
        """Called before a choice: says how far the search is, and returns what the choice itself reports to."""


class Chooser(Protocol[State]):
    """Finds the best of some options by some measure."""

    def choose(
        self, state: State, options: Sequence[Option[State]], value: float, progress: Progress
    ) -> tuple[Option[State], float] | None:
        """The best option and its value, lower is better; None where none is considered.

        Args:
            state: where all options start from.
            options: at least one.
            value: of that state.
            progress: told how many were looked at.
        """


@dataclass(frozen=True)
class Grown(Generic[State]):
    """Where a greedy search ended."""

    state: State
    value: float
    """Of the last choice."""
    reached: bool
    """Whether the goal is reached; if not, nothing more could be chosen."""


def grow(
    growth: Growth[State], state: State, chooser: Chooser[State], value: float = 0.0,
    progress: Progress = lambda line: None,
) -> Grown[State]:  # fmt: skip
    """Choose until the goal is reached or nothing more can be chosen.

    Args:
        growth: what may be chosen, and the goal.
        state: where to begin.
        chooser: finds the best option of every step.
        value: of the first state, for choosers that look at rises.
        progress: told how far it is.
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
    """Chooses the option of least energy; looks at all of them, at each no longer than it may be the best."""

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
    """Chooses the option of least rise of energy for its gain, and looks again only at those that may be it.

    What an option cost at an earlier step is taken for the least that it costs now, as in Minoux's accelerated greedy
    algorithm (1978). It need not be so, for removals help or hurt each other; the choice is then not the very best.
    """

    def __init__(self, space: Space[State]) -> None:
        self.space = space
        self.known: dict[Hashable, float] = {}
        """Rise for its gain of every choice, when it was last looked at."""

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
