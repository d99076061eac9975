"""Split measurements of batches among the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import TypeVar

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.staged.rows import RowCounts

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


def shared_step(ranks: Parallel, batch: Batch, chunk_tokens: int, counts: RowCounts | None = None) -> tuple[Batch, int]:
    """One batch of this rank in a form that ranks can run at the same time, and the number of calls of the heads.

    With sharded weights every forward pass is a collective: no rank may leave out the decode pass or a chunk of logits.
    The number of calls is 0 (no minimum) with whole weights.
    """
    if ranks.whole:
        return batch, 0
    tokens = int(batch.response_mask.sum()) if counts is None else counts.tokens
    return batch.with_decode(), ranks.largest(ceil(tokens / chunk_tokens))
