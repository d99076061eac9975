"""The processes of a run: how they agree, gather, share work and wait. No Lightning here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import DistError, TCPStore

from pdtrim_pl.errors import AnotherRankFailed, RankLost

T = TypeVar("T")
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded weights whole on every rank for as long as its context lasts; every rank must enter it."""

_OUTCOME, _READ = "outcome", "read"
_PATIENCE = 60
"""Seconds until rank 0 believes that a rank which has not asked for the outcome never will."""


class Parallel:
    """How one process of a run stands among the others, and what it does with weights that they share.

    This class is a process that runs alone. Every strategy has a subclass (`pdtrim_pl.strategies.parallel_of`).
    What it calls a collective every rank must call, equally often and in the same order.

    Args:
        leave_if_asked: called by every rank before every evaluation and, in `check_in`, every group of local fits;
            raises where the run has to leave the machine.
    """

    rank: int = 0
    size: int = 1
    host: str = "localhost"
    """Where rank 0 runs, as the others reach it."""
    whole: bool = True
    """Whether every rank holds whole weights. If not (ZeRO-3, FSDP), every forward pass is a collective."""

    def __init__(self, leave_if_asked: Callable[[], None] = lambda: None) -> None:
        self.leave_if_asked = leave_if_asked

    # Values

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective.

        Rounding may differ between ranks, and what they choose must not.
        """
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank. Collective."""
        return [value]

    def hand_out(self, tensor: Tensor, source: int) -> None:
        """Write the tensor of rank `source` into that of every other rank. Collective."""

    def largest(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        return value

    # Weights

    def whole_weights(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Make sharded weights whole on every rank for as long as the context lasts. Changes are lost. Collective."""
        return nullcontext()

    def own_part(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a weight."""
        return parameter

    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put rank 0's value into a parameter that trains, and into all copies of it. Collective.

        Args:
            parameter: or this rank's shard of it.
            value: the whole weight.
        """
        with torch.no_grad():
            parameter.copy_(value)

    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[nn.Parameter]) -> None:
        """Make the optimizers forget what they know of written weights, and train created ones from now on."""

    def forget_gradients(self) -> None:
        """After a plan has changed: keep no gradient of a block that takes none any more."""

    # Work

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


def on_first_rank(ranks: Parallel, work: Callable[[], None], *, every: float = 1.0) -> None:
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
