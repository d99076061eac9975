"""What an engine must offer so that the HTTP application can stand in front of it."""

from __future__ import annotations

from typing import Protocol

from pdtrim_pl.serving.engine.requests import Ask, Listener
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair


class TokenEngine(Protocol):
    """Answers requests with tokens: our own engine, or a router to two others. Calls may come from any thread."""

    pair: ExportedPair
    watch: Watch
    """Counts and times of all requests."""

    @property
    def trouble(self) -> str:
        """Why it cannot serve now; empty if it can."""

    def submit(self, ask: Ask, tell: Listener) -> int:
        """Queue a request; returns its number, for `cancel`.

        Args:
            ask: what is asked.
            tell: hears every token, and at last `Done`.

        Raises:
            UserError: the model cannot hold it.
            Overloaded: the queue is full.
            RuntimeError: the engine does not run.
        """

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended. Its listener hears `Done`."""
