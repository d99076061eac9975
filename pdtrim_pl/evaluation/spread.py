"""Measurements of single batches, split among the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.parallel import Parallel

T = TypeVar("T")


def measured_by_ranks(
    ranks: Parallel, batches: Sequence[Batch], measure: Callable[[Batch, Sequence[Batch]], T]
) -> list[T]:
    """What `measure` says of every batch, in their order, on every rank; each rank measures its share of them.

    Args:
        ranks: of the run.
        batches: the same on every rank.
        measure: given a batch and all that the ranks work on at that time.
    """
    groups = ranks.peers(shared_steps(ranks, batches))
    every = ranks.together(lambda: [measure(group[ranks.rank % len(group)], group) for group in groups])
    return [every[index % ranks.size][index // ranks.size] for index in range(len(batches))]


def shared_steps(ranks: Parallel, batches: Sequence[Batch]) -> list[Batch]:
    """The batches as ranks can run them side by side: with sharded weights none may leave out the decode pass."""
    return list(batches) if ranks.whole else [batch.with_decode() for batch in batches]
