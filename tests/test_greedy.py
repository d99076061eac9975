"""The greedy search over any states: it chooses until the goal, and says where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.search import Option, grow

Numbers = tuple[int, ...]


class Picks:
    """States are picks from a pool, each at most once; the goal is so many."""

    def __init__(self, pool: Sequence[int], goal: int) -> None:
        self.pool, self.goal = pool, goal

    def reached(self, state: Numbers) -> bool:
        return len(state) == self.goal

    def options(self, state: Numbers) -> list[Option[Numbers]]:
        return [Option(number, (*state, number)) for number in self.pool if number not in state]

    def step(self, state: Numbers, progress: Progress) -> Progress:
        return lambda line: progress(f"{len(state)} picked: {line}")


class LeastSum:
    """Picks the smallest number that is not refused; notes the values it is told."""

    def __init__(self, refused: Sequence[int] = ()) -> None:
        self.refused = refused
        self.told: list[float] = []

    def choose(
        self, state: Numbers, options: Sequence[Option[Numbers]], value: float, progress: Progress
    ) -> tuple[Option[Numbers], float] | None:
        progress(f"{len(options)} left")
        self.told.append(value)
        left = [option for option in options if option.choice not in self.refused]
        best = min(left, key=lambda option: sum(option.state), default=None)
        return None if best is None else (best, float(sum(best.state)))


@given(st.sets(st.integers(-50, 50), min_size=1, max_size=8), st.data())
def test_a_search_picks_the_best_of_every_step_until_the_goal(pool: set[int], data: st.DataObject) -> None:
    goal, chooser, lines = data.draw(st.integers(0, len(pool))), LeastSum(), list[str]()
    grown = grow(Picks(list(pool), goal), (), chooser, 0.0, lines.append)
    expected = tuple(sorted(pool)[:goal])
    assert (grown.state, grown.value, grown.reached) == (expected, sum(expected), True)
    assert chooser.told == [sum(expected[:taken]) for taken in range(goal)], "each step starts from the value before"
    assert lines == [f"{taken} picked: {len(pool) - taken} left" for taken in range(goal)]


def test_a_search_that_runs_out_of_options_says_how_far_it_came() -> None:
    grown = grow(Picks([2, 1], 3), (), LeastSum())
    assert (grown.state, grown.value, grown.reached) == ((1, 2), 3.0, False)


def test_a_search_ends_where_the_chooser_considers_no_option() -> None:
    grown = grow(Picks([3, 1, 2], 3), (), LeastSum(refused=[1, 3]), 7.0)
    assert (grown.state, grown.value, grown.reached) == ((2,), 2.0, False)
    stuck = grow(Picks([1], 1), (), LeastSum(refused=[1]), 7.0)
    assert (stuck.state, stuck.value, stuck.reached) == ((), 7.0, False)
