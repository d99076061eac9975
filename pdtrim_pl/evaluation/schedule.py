"""Choose the next candidate and the next batch to evaluate, so that no work is spent on candidates that cannot win."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pdtrim_pl.evaluation.journal import Sums
from pdtrim_pl.parallel import Parallel


class BatchOrder:
    """The order of batches: first the batches that had the largest shares of the energy of earlier plans.

    Batch `i` is batch number `i // size` of rank `i % size`. Ranks with whole weights choose among their own batches.
    Ranks with sharded weights take the batches of one number at the same time.
    """

    def __init__(self, count: int, ranks: Parallel) -> None:
        self.count, self.ranks = count, ranks
        self.weight = [0.0] * count
        """For each batch, the sum of its shares of the energy of earlier plans."""

    @property
    def learned(self) -> bool:
        """Whether the weights of the batches are known from at least one plan."""
        return any(self.weight)

    def next(self, known: Mapping[int, Sums]) -> list[int | None]:
        """For every rank, the next batch to evaluate; None if the rank has no batch left."""
        left, size = set(range(self.count)) - set(known), self.ranks.size
        if self.ranks.whole:
            order = sorted(left, key=lambda batch: (-self.weight[batch], batch))
            return [next((batch for batch in order if batch % size == rank), None) for rank in range(size)]
        weights = dict.fromkeys(sorted({batch // size for batch in left}), 0.0)
        for batch in left:
            weights[batch // size] += self.weight[batch]
        number = max(weights, key=weights.__getitem__)
        return [batch if batch in left else None for batch in range(number * size, (number + 1) * size)]

    def learn(self, known: Mapping[int, Sums], total: float) -> None:
        """Learn from a plan that was evaluated on all batches.

        Args:
            known: batch number -> sums of the plan.
            total: the KL of all batches together; must be finite.
        """
        for batch, sums in known.items():
            self.weight[batch] += sums.kl / total if total > 0 else 0.0


@dataclass(frozen=True)
class Runner:
    """The evaluation of one candidate, batch by batch."""

    bound: Callable[[], float]
    """Lower bound of its measure, nats: the batches so far. Every further batch can only add to it."""
    started: Callable[[], bool]
    """Whether it was evaluated on at least one batch."""
    finished: Callable[[], bool]
    """Whether it was evaluated on all batches."""
    extend: Callable[[], None]
    """Evaluates it on one more batch."""


def race(
    runners: Sequence[Runner], order: BatchOrder, progress: Callable[[int], None] = lambda evaluated: None
) -> tuple[int, float]:
    """The index of the best candidate and its measure in nats. Of equal candidates, the one of lower index wins.

    The candidate with the lowest bound always gets the next batch. So the others are evaluated only as far as is needed
    to exclude them.

    Args:
        runners: the candidates, at least one.
        order: the order of batches. It learns from every candidate that is evaluated on all batches.
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
    # Finish the leader first: its result is probably needed, and it shows which batches are informative.
    leader = heap[0][1]
    while not runners[leader].finished() and not order.learned:
        extend(leader)
    heapq.heapreplace(heap, (runners[leader].bound(), leader))
    while True:
        index = heap[0][1]
        if runners[index].finished():
            return index, runners[index].bound()
        extend(index)
        heapq.heapreplace(heap, (runners[index].bound(), index))
