"""Split measurements of batches among the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.parallel import Parallel

T = TypeVar("T")


def measured_by_ranks(
    ranks: Parallel, batches: Sequence[Batch], measure: Callable[[Batch, Sequence[Batch]], T]
) -> list[T]:
    """Measure every batch; each rank measures its share.

    Args:
        ranks: the ranks of the run.
        batches: the batches, the same on every rank.
        measure: called with a batch and with the batches that all ranks measure at the same time.

    Returns:
        The results in the order of `batches`, on every rank.
    """
    groups = ranks.peers(shared_steps(ranks, batches))
    every = ranks.together(lambda: [measure(group[ranks.rank % len(group)], group) for group in groups])
    return [every[index % ranks.size][index // ranks.size] for index in range(len(batches))]


def shared_steps(ranks: Parallel, batches: Sequence[Batch]) -> list[Batch]:
    """The batches in a form that ranks can run at the same time: with sharded weights, all need a decode pass."""
    return list(batches) if ranks.whole else [batch.with_decode() for batch in batches]
