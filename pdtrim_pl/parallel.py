"""The processes of a run: how they agree, gather, share work and wait. No Lightning here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed import DistError, TCPStore

from pdtrim_pl.errors import AnotherRankFailed, RankLost

T = TypeVar("T")
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded weights whole on every rank for as long as its context lasts; every rank must enter it."""

_OUTCOME, _READ = "outcome", "read"
_PATIENCE = 60
"""Seconds until rank 0 believes that a rank which has not asked for the outcome never will."""


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


def on_first_rank(ranks: Ranks, work: Callable[[], None], *, every: float = 1.0) -> None:
    """Have rank 0 do what it alone can do, while the others wait for as long as it takes; every rank must call it.

    They ask a store on rank 0's machine. In a collective they could not wait: it gives up after 30 minutes, and an
    export of a large model, measured before and verified behind, may take longer.

    Args:
        ranks: of the run.
        work: has no collective in it.
        every: seconds between two questions.

    Raises:
        AnotherRankFailed: on the others, where rank 0 failed; `RankLost` where it is gone.
    """
    if ranks.size == 1:
        work()
        return
    if ranks.rank == 0:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ranks.agree(store.port)
        _tell(store, ranks.size - 1, work, every)
    else:
        _ask(TCPStore(ranks.host, ranks.agree(None), is_master=False, wait_for_workers=False), every)


def _tell(store: TCPStore, others: int, work: Callable[[], None], every: float) -> None:
    outcome = "It was interrupted."
    try:
        work()
        outcome = ""
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:  # an interrupt too: nobody shall wait for a rank that leaves
        store.set(_OUTCOME, outcome)
        until = time.monotonic() + _PATIENCE
        while store.add(_READ, 0) < others and time.monotonic() < until:  # the store ends with this process
            time.sleep(every)


def _ask(store: TCPStore, every: float) -> None:
    try:
        while not store.check([_OUTCOME]):
            time.sleep(every)
        outcome = store.get(_OUTCOME).decode()
        store.add(_READ, 1)
    except DistError as error:
        raise RankLost(f"Rank 0 is gone, so every rank leaves: {error}") from error
    if outcome:
        raise AnotherRankFailed(f"Rank 0 failed, so every rank leaves. There: {outcome}")
