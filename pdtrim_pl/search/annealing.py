"""Simulated annealing: exchange one removal for another, accept the exchange by its energy, keep the best state."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log as ln

from pdtrim_pl.errors import UserError
from pdtrim_pl.search.space import Space, State


@dataclass(frozen=True)
class Annealing:
    """Budget and cooling of an annealing that starts from the greedy state.

    A move exchanges one removal for another candidate. It is accepted with probability exp(-dE / T), where E is the
    mean KL to the teacher. The random number is drawn before the evaluation. So an evaluation stops as soon as the move
    is certain to be refused.
    """

    evaluations: int = 200
    """Number of states to evaluate. States whose energy is already known count too, so that a resumed search ends in
    the same state as an uninterrupted one."""
    seconds: float | None = None
    """Time limit for descent and annealing together, without the greedy search; None for no limit. With a limit, two
    runs may end in different states."""
    temperature: float = 0.05
    """Initial temperature, as a share of the greedy state's energy."""
    cooling: float = 0.98
    """Factor on the temperature after every move."""
    seed: int = 0
    descend: bool = True
    """Begin with a descent that takes larger steps, until none of them lowers the energy. In a round, a step exchanges
    one removal for the best other one. In a joint search, a step chooses all removals of one stage again. The steps do
    not count as `evaluations`."""

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.temperature <= 0 or not 0 < self.cooling <= 1:
            raise UserError(
                f"`annealing` needs `evaluations` >= 1, `temperature` > 0 and `cooling` in (0, 1], got {self}."
            )


def anneal(
    space: Space[State], first: State, settings: Annealing, progress: Callable[[str], None] = lambda line: None
) -> tuple[State, float]:
    """Search from `first` and return the best state seen, with its energy. The same seed gives the same result.

    Raises:
        UserError: the energy of `first` is not finite.
    """
    draw, began = random.Random(settings.seed), time.monotonic()

    def over() -> bool:
        if settings.seconds is None:
            return False
        return bool(space.evaluator.ranks.agree(time.monotonic() - began > settings.seconds))

    if settings.descend:
        first, first_energy = space.improved(first, progress, over)
    else:
        first_energy = space.known_energy(first)
    current, current_energy = first, first_energy
    best, best_energy = first, first_energy
    temperature, accepted, started = settings.temperature * max(first_energy, 1e-12), 0, time.monotonic()
    space.rebase(current)
    for move in range(1, settings.evaluations + 1):
        candidate = space.neighbour(current, draw)
        if candidate is None:
            break
        limit = current_energy - temperature * ln(1.0 - draw.random())
        energy = space.energy(candidate, limit)
        temperature *= settings.cooling
        if energy is not None:
            accepted += candidate != current
            current, current_energy = candidate, energy
            space.rebase(current)
            if energy < best_energy:
                best, best_energy = candidate, energy
        seconds = time.monotonic() - started
        progress(
            f"annealing {move}/{settings.evaluations}: best {best_energy:.4f} (start {first_energy:.4f}), accepted "
            f"{accepted / move:.0%}, {move / max(seconds, 1e-9):.2f} evaluations/s, about "
            f"{_left(move, seconds, settings, time.monotonic() - began):.0f} s left"
        )
        if over():
            break
    return best, best_energy


def _left(moves: int, seconds: float, settings: Annealing, elapsed: float) -> float:
    """Estimate of the seconds left, from the speed so far and the time limit."""
    left = seconds / moves * (settings.evaluations - moves)
    return left if settings.seconds is None else min(left, max(settings.seconds - elapsed, 0.0))
