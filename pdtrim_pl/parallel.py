"""Communication between the processes of a run: agree, gather, split work, wait. Imports no Lightning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import DistError, TCPStore

from pdtrim_pl.errors import AnotherRankFailed, RankLost

T = TypeVar("T")
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""A context manager that makes sharded weights whole on every rank. It is a collective: every rank must enter it."""

_OUTCOME, _READ = "outcome", "read"
_PATIENCE = 60
"""Maximum seconds that rank 0 waits for the other ranks to read the outcome."""


def of_every_rank(value: T) -> list[T]:
    """The values of all processes, by rank. Collective: every process must call it. It knows no strategy."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, value)
    return every


class Parallel:
    """Communication between the processes of a run, and access to weights that they share.

    This class serves a process that runs alone. Every strategy has a subclass (`pdtrim_pl.strategies.parallel_of`).
    All ranks must call a collective the same number of times, and all collectives in the same order.

    Args:
        leave_if_asked: called by every rank before every evaluation and, in `check_in`, before every group of local
            fits. It raises if the process has to stop.
    """

    rank: int = 0
    size: int = 1
    """Number of ranks."""
    host: str = "localhost"
    """Address of rank 0's machine for the other ranks."""
    whole: bool = True
    """Whether every rank holds whole weights. If not (ZeRO-3, FSDP), every forward pass is a collective."""
    gathers_heads: bool = False
    """Whether training gathers sharded heads once for all chunks of a batch, so that ranks may have different numbers
    of chunks."""

    def __init__(self, leave_if_asked: Callable[[], None] = lambda: None) -> None:
        self.leave_if_asked = leave_if_asked

    # Values

    def agree(self, value: Any) -> Any:
        """The value of rank 0, on every rank. Collective.

        Measured values may differ between ranks by rounding; choices that depend on them must not.
        """
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in the order of ranks, on every rank. Collective."""
        return [value]

    def hand_out(self, tensor: Tensor, source: int) -> None:
        """Copy the tensor of rank `source` into the tensor of every other rank. Collective."""

    def largest(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        return value

    # Weights

    def whole_weights(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Make sharded weights whole on every rank inside the `with` block. Changes are lost. Collective."""
        return nullcontext()

    def own_part(self, parameter: nn.Parameter) -> Tensor:
        """The part of a weight that this rank holds."""
        return parameter

    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write the value of rank 0 into a parameter and into all copies of it. Collective.

        Args:
            parameter: the parameter, or this rank's shard of it.
            value: the whole weight.
        """
        with torch.no_grad():
            parameter.copy_(value)

    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[tuple[int, nn.Parameter]]) -> None:
        """Reset the optimizer states of `written` parameters, and add the `created` ones of blocks to the optimizers.

        Args:
            written: parameters with new values.
            created: (block, new parameter of it) pairs.
        """

    def release(self, unused: Sequence[nn.Parameter]) -> None:
        """Free the optimizer states of weights that no pass needs any more, and move the weights to host memory.

        A strategy that shards cannot do this and does nothing.
        """

    def forget_gradients(self) -> None:
        """Clear stored gradients after a change of plan, so that dropped blocks are not updated with old ones."""

    # Work

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results in the order of ranks. If it fails on one rank, all raise.

        Otherwise the other ranks would wait forever for a rank that failed. With sharded weights this is not possible,
        since the others wait inside a forward pass. There the failing rank exits, and the launcher must end the others
        (`srun --kill-on-bad-exit`, as in `jobs/`).

        Args:
            work: the work of this rank. With whole weights it must not contain a collective other than `check_in`.

        Raises:
            AnotherRankFailed: another rank failed. The failing rank raises its own error.
        """
        failure: Exception | None = None
        value: Any = None
        try:
            value = work()
        except AnotherRankFailed:
            raise  # all ranks already know
        except Exception as error:  # any error is raised again below, after the other ranks were informed
            if not self.whole:
                raise
            failure = error
        results = self.gather((value, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(results):
            if text is not None:
                raise AnotherRankFailed(f"Rank {rank} failed, so every rank leaves. There: {text}")
        return [value for value, _ in results]

    def check_in(self) -> None:
        """Synchronise in the middle of long work, and stop if another rank has failed. Collective.

        Raises:
            AnotherRankFailed: another rank has failed.
        """
        self.together(lambda: None)
        self.leave_if_asked()

    def peers(self, items: Sequence[T]) -> list[list[T]]:
        """For each item of this rank, the items that all ranks work on at the same time.

        With whole weights every rank works alone, and each item is its only peer. Under ZeRO-3 and FSDP every rank must
        run the same number of items: a rank without an item repeats the last one.
        """
        size, last = self.size, len(items) - 1
        if self.whole:
            return [[item] for item in items[self.rank :: size]]
        return [[items[min(i, last)] for i in range(first, first + size)] for first in range(0, len(items), size)]


def on_first_rank(ranks: Parallel, work: Callable[[], None], *, every: float = 1.0) -> None:
    """Run `work` on rank 0 only, while the other ranks wait without a time limit. Every rank must call it.

    The other ranks poll a store on rank 0's machine. A collective would time out after 30 minutes, and the export of a
    large model, with its measurement and verification, may take longer.

    Args:
        ranks: the ranks of the run.
        work: the work of rank 0. It must not contain a collective.
        every: seconds between two polls.

    Raises:
        AnotherRankFailed: rank 0 failed. Raised on the other ranks.
        RankLost: rank 0 is gone. Raised on the other ranks.
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
    """On rank 0: run `work`, publish its outcome (empty for success), and wait until the others have read it."""
    outcome = "It was interrupted."
    try:
        work()
        outcome = ""
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:  # also after an interrupt, so that no rank waits for this one
        store.set(_OUTCOME, outcome)
        until = time.monotonic() + _PATIENCE
        while store.add(_READ, 0) < others and time.monotonic() < until:  # the store ends with this process
            time.sleep(every)


def _ask(store: TCPStore, every: float) -> None:
    """On the other ranks: wait for the outcome, and raise if rank 0 failed or is gone."""
    try:
        while not store.check([_OUTCOME]):
            time.sleep(every)
        outcome = store.get(_OUTCOME).decode()
        store.add(_READ, 1)
    except DistError as error:
        raise RankLost(f"Rank 0 is gone, so every rank leaves: {error}") from error
    if outcome:
        raise AnotherRankFailed(f"Rank 0 failed, so every rank leaves. There: {outcome}")
