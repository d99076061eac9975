"""A request to the engine: what is asked, what is heard of it, and its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pdtrim_pl.serving.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "deadline", "error", "unavailable"]
"""Why a request ended: at a stop token, at its most tokens, by its caller, by its time, by a fault, or because an
engine that it needs is gone."""


class Overloaded(RuntimeError):
    """The queue is full: try again later."""


@dataclass(frozen=True)
class Token:
    """A token of a response."""

    id: int


@dataclass(frozen=True)
class Done:
    """The end of a request. Nothing follows."""

    reason: Reason
    message: str = ""
    """What went wrong, if something did."""


Event = Token | Done
Listener = Callable[[Event], None]
"""Hears of a request, in the engine's own thread: it must return at once."""


@dataclass(frozen=True)
class Ask:
    """A request for tokens."""

    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    deadline: float | None = None
    """Seconds from now; then the request ends, finished or not."""


@dataclass(eq=False)
class Running:
    """A request that has not ended."""

    number: int
    ask: Ask
    tell: Listener
    began: float = field(default_factory=time.monotonic)
    state: Literal["waiting", "prefill", "decode"] = "waiting"
    first: float | None = None
    """When its first token came."""
    tokens: int = 0

    @property
    def ends_at(self) -> float:
        """When its time is over."""
        return float("inf") if self.ask.deadline is None else self.began + self.ask.deadline
