"""Simulated annealing over the removals of one round: exchange one for another, accept by energy, keep the best."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log as ln

from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.journal import Journal, State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annealing:
    """Budget and cooling of a search that starts from a round's greedy choice.

    A move exchanges one removal for another candidate and is accepted with probability exp(-dE / T), where E is the
    mean KL to the teacher. The random draw is made before the evaluation, which is given up once it is certain to be
    refused.
    """

    evaluations: int = 200
    """States looked at, known ones included, so that a continued search ends where an uninterrupted one does."""
    seconds: float | None = None
    """Stop after so many seconds; None sets no limit. With a limit, two runs may end in different states."""
    temperature: float = 0.05
    """First temperature, as a share of the greedy state's energy."""
    cooling: float = 0.98
    """Factor on the temperature after every move."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.temperature <= 0 or not 0 < self.cooling <= 1:
            raise ValueError(
                f"`annealing` needs `evaluations` >= 1, `temperature` > 0 and `cooling` in (0, 1], got {self}."
            )


class RoundSearch:
    """The states of one round: plans made from the round's first plan by a set of drops of fixed size."""

    def __init__(
        self, evaluator: Evaluator, start: StagePlan, target: Target, count: int, guards: Guards, *, journal: Journal
    ) -> None:
        self.evaluator, self.start, self.target, self.journal = evaluator, start, target, journal
        pool = start.candidates(target, guards.protect_first, guards.protect_last)
        everything = start.drop_candidates(target, guards.protect_first, guards.protect_last)
        self.pool = pool if len(pool) >= count else everything
        self.evaluated = 0
        """Evaluations that had to be made, not read."""

    def plan(self, state: State) -> StagePlan:
        """The plan of a state, without scores in its history."""
        plan = self.start
        for block in state:
            plan = plan.drop(self.target, block)
        return plan

    def final(self, state: State, energy: float, round: int) -> StagePlan:
        """The plan of the state that a search returned, its history saying so."""
        plan = self.start
        for block in state:
            plan = plan.drop(self.target, block, round=round, criterion="annealing", score=energy)
        return plan

    def energy(self, state: State, limit: float = float("inf")) -> float | None:
        """The state's energy if it is below `limit`, else None."""
        known = self.journal.energy(state)
        if known is None and self.journal.at_least(state) < limit:
            known = self.evaluator.energy_below(self.plan(state), limit)
            self.evaluated += 1
            self.journal.add(state, known, limit)
        return known if known is not None and known < limit else None

    def neighbour(self, state: State, draw: random.Random) -> State:
        """Exchange one removal for a candidate that is still there."""
        left = [block for block in self.pool if block not in state]
        out, into = draw.choice(state), draw.choice(left)
        return tuple(sorted({*state, into} - {out}))


def anneal(
    search: RoundSearch, first: State, settings: Annealing, progress: Callable[[str], None] = lambda line: None
) -> tuple[State, float]:
    """Search from `first`; returns the best state ever seen and its energy. The same seed gives the same result."""
    draw = random.Random(settings.seed)
    first_energy = search.energy(first)
    assert first_energy is not None
    current, current_energy = first, first_energy
    best, best_energy = first, first_energy
    temperature, accepted, started = settings.temperature * max(first_energy, 1e-12), 0, time.monotonic()
    search.evaluator.rebase(search.plan(current))
    if len(search.pool) <= len(first):
        return best, best_energy  # nothing to exchange with
    for move in range(1, settings.evaluations + 1):
        candidate = search.neighbour(current, draw)
        limit = current_energy - temperature * ln(1.0 - draw.random())
        energy = search.energy(candidate, limit)
        temperature *= settings.cooling
        if energy is not None:
            current, current_energy, accepted = candidate, energy, accepted + 1
            search.evaluator.rebase(search.plan(current))
            if energy < best_energy:
                best, best_energy = candidate, energy
        seconds = time.monotonic() - started
        progress(
            f"annealing {move}/{settings.evaluations}: best {best_energy:.4f} (greedy {first_energy:.4f}), accepted "
            f"{accepted / move:.0%}, {search.evaluated / max(seconds, 1e-9):.2f} evaluations/s, about "
            f"{seconds / move * (settings.evaluations - move):.0f} s left"
        )
        if settings.seconds is not None and search.evaluator.agree(seconds > settings.seconds):
            break
    return best, best_energy
