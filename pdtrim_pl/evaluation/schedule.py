"""Which candidate an evaluation takes next, and on which batch: no work on those that cannot win any more."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pdtrim_pl.evaluation.journal import Sums
from pdtrim_pl.parallel import Parallel


class BatchOrder:
    """Which batch comes next: one that held much of the energy of plans so far, for it tells most.

    Batch `i` is the `i // size`-th of rank `i % size`. Ranks with whole weights choose among their own batches; others
    keep step and take those of one place together.
    """

    def __init__(self, count: int, ranks: Parallel) -> None:
        self.count, self.ranks = count, ranks
        self.weight = [0.0] * count
        """How much of the energy each batch has held so far."""

    @property
    def taught(self) -> bool:
        """Whether any plan has told how much the batches hold."""
        return any(self.weight)

    def next(self, known: Mapping[int, Sums]) -> list[int | None]:
        """For every rank, the next of the batches that it has left; None where it has none."""
        left, size = set(range(self.count)) - set(known), self.ranks.size
        if self.ranks.whole:
            order = sorted(left, key=lambda batch: (-self.weight[batch], batch))
            return [next((batch for batch in order if batch % size == rank), None) for rank in range(size)]
        told = dict.fromkeys(sorted({batch // size for batch in left}), 0.0)
        for batch in left:
            told[batch // size] += self.weight[batch]
        place = max(told, key=told.__getitem__)
        return [batch if batch in left else None for batch in range(place * size, (place + 1) * size)]

    def learn(self, known: Mapping[int, Sums], total: float) -> None:
        """From a plan that was evaluated on all batches, and its finite total."""
        for batch, sums in known.items():
            self.weight[batch] += sums.kl / total if total > 0 else 0.0


@dataclass(frozen=True)
class Runner:
    """One candidate on its way through the batches."""

    bound: Callable[[], float]
    """Its measure over the batches so far, nats: each batch can only add to it."""
    started: Callable[[], bool]
    finished: Callable[[], bool]
    extend: Callable[[], None]
    """Evaluates it on one more batch."""


def race(
    runners: Sequence[Runner], order: BatchOrder, progress: Callable[[int], None] = lambda evaluated: None
) -> tuple[int, float]:
    """The index of the best candidate, and its measure; the lower index where two are equal.

    The one that may still be best is always the next to see a batch, so all others are evaluated no further than it
    takes to be certain.

    Args:
        runners: at least one.
        order: learns from every candidate that comes to its end.
        progress: called with the number of batches evaluated so far.
    """
    evaluated = 0

    def extend(index: int) -> None:
        nonlocal evaluated
        runners[index].extend()
        evaluated += 1
        progress(evaluated)

    for index, runner in enumerate(runners):
        if not runner.started():
            extend(index)
    heap = [(runner.bound(), index) for index, runner in enumerate(runners)]
    heapq.heapify(heap)
    # The leader to the end first: it is likely to be needed, and teaches which batches tell most.
    leader = heap[0][1]
    while not runners[leader].finished() and not order.taught:
        extend(leader)
    heapq.heapreplace(heap, (runners[leader].bound(), leader))
    while True:
        index = heap[0][1]
        if runners[index].finished():
            return index, runners[index].bound()
        extend(index)
        heapq.heapreplace(heap, (runners[index].bound(), index))
