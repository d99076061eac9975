"""The processes that evaluate together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded weights whole on every rank for as long as its context lasts; every rank must enter it."""


@dataclass(frozen=True)
class Ranks:
    """How one process of a run stands among the others; alone by default."""

    rank: int = 0
    size: int = 1
    agree: Callable[[Any], Any] = lambda value: value
    """Rank 0's value on every rank: rounding may differ between ranks, and what they choose must not."""
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Every rank's value, in order of rank, on every rank."""
    own: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter
    """What this rank holds of a weight."""
    gather_weights: Gather | None = None
    """The strategy's, where it shards weights."""
    whole: bool = True
    """Whether every rank holds whole weights. If not, all must run the same blocks at the same time: in an evaluation
    each on batches of its own."""
    leave_if_asked: Callable[[], None] = lambda: None
    """Called by every rank before every evaluation and every group of local fits; raises where the run has to leave the
    machine."""
