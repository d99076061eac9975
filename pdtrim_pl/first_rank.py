"""Long work of rank 0 that the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import DistError, TCPStore

from pdtrim_pl.evaluation.ranks import AnotherRankFailed, Ranks

_OUTCOME, _READ = "outcome", "read"
_PATIENCE = 60
"""Seconds until rank 0 believes that a rank which has not asked for the outcome never will."""


def on_first_rank(ranks: Ranks, work: Callable[[], None], *, every: float = 1.0) -> None:
    """Have rank 0 do what it alone can do, while the others wait for as long as it takes; every rank must call it.

    They ask a store on rank 0's machine. In a collective they could not wait: it gives up after 30 minutes, and an
    export of a large model, measured before and verified behind, may take longer.

    Args:
        ranks: of the run.
        work: has no collective in it.
        every: seconds between two questions.

    Raises:
        AnotherRankFailed: on the others, where rank 0 failed or is gone.
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
        raise AnotherRankFailed(f"Rank 0 is gone, so every rank leaves: {error}") from error
    if outcome:
        raise AnotherRankFailed(f"Rank 0 failed, so every rank leaves. There: {outcome}")
