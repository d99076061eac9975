"""The processes that evaluate together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from pdtrim_pl.data.collate import Batch

T = TypeVar("T")
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded weights whole on every rank for as long as its context lasts; every rank must enter it."""


class AnotherRankFailed(RuntimeError):
    """Every rank leaves because one of them could not go on."""


@dataclass(frozen=True)
class Ranks:
    """How one process of a run stands among the others; alone by default."""

    rank: int = 0
    size: int = 1
    agree: Callable[[Any], Any] = lambda value: value
    """Rank 0's value on every rank: rounding may differ between ranks, and what they choose must not."""
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Every rank's value, in order of rank, on every rank."""
    hand_out: Callable[[Tensor, int], None] = lambda tensor, source: None
    """Writes the tensor of rank `source` into that of every other rank."""
    host: str = "localhost"
    """Where rank 0 runs, as the others reach it."""
    own: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter
    """What this rank holds of a weight."""
    gather_weights: Gather | None = None
    """The strategy's, where it shards weights."""
    whole: bool = True
    """Whether every rank holds whole weights. If not, all must run the same blocks at the same time: in an evaluation
    each on batches of its own."""
    leave_if_asked: Callable[[], None] = lambda: None
    """Called by every rank before every evaluation and, in `check_in`, every group of local fits; raises where the run
    has to leave the machine."""

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in order of rank, on every rank. If it fails on one, all raise.

        Without this, the others would wait for a rank that has left. With sharded weights they wait inside a forward
        pass, where nobody can tell them: there the failing rank ends, and its launcher ends the others (`srun
        --kill-on-bad-exit`, as in `jobs/`).

        Args:
            work: has no collective in it where weights are whole, except `check_in`.

        Raises:
            AnotherRankFailed: on the ranks whose own work went well.
        """
        failure: Exception | None = None
        value: Any = None
        try:
            value = work()
        except AnotherRankFailed:
            raise  # every rank knows
        except Exception as error:  # whatever it is, it is raised again, once the others know
            if not self.whole:
                raise
            failure = error
        told = self.gather((value, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise AnotherRankFailed(f"Rank {rank} failed, so every rank leaves. There: {text}")
        return [value for value, _ in told]

    def check_in(self) -> None:
        """Go on if every rank does; called by every rank equally often in the middle of long work.

        Raises:
            AnotherRankFailed: another rank has left its work with an error.
        """
        self.together(lambda: None)
        self.leave_if_asked()

    def peers(self, items: Sequence[T]) -> list[list[T]]:
        """Per item of this rank, those that are worked on with it: itself, or what all ranks run at that time.

        Under ZeRO-3 and FSDP every rank must run the same number of items: one without an item repeats the last.
        """
        size, last = self.size, len(items) - 1
        if self.whole:
            return [[item] for item in items[self.rank :: size]]
        return [[items[min(i, last)] for i in range(first, first + size)] for first in range(0, len(items), size)]

    def of_every(self, batches: Sequence[Batch], measure: Callable[[Batch, Sequence[Batch]], T]) -> list[T]:
        """What `measure` says of every batch, in their order, on every rank; each rank measures its share of them.

        Args:
            batches: the same on every rank.
            measure: given a batch and all that the ranks work on at that time.
        """
        groups = self.peers(batches if self.whole else [batch.with_decode() for batch in batches])
        every = self.together(lambda: [measure(group[self.rank % len(group)], group) for group in groups])
        return [every[index % self.size][index // self.size] for index in range(len(batches))]
