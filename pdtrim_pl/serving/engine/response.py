"""The text of one response of the engine, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdtrim_pl.serving.engine.interface import TokenEngine
from pdtrim_pl.serving.engine.requests import Ask, Done, Event, Reason, Token
from pdtrim_pl.serving.text import Decode, TextStream


@dataclass(frozen=True)
class Ended:
    """The end of a response."""

    reason: Reason
    tokens: int
    """Tokens of the response, the stop token included."""
    message: str = ""
    """What went wrong, if something did."""


class Response:
    """A request whose text is told as it comes; a stop string ends it.

    Args:
        engine: serves the request.
        ask: what is asked.
        decode: from token ids to their text.
        stop: texts that end the response.
        tell: hears every piece of text, and at last `Ended`, in the engine's thread: it must return at once.

    Raises:
        UserError: the model cannot hold the request.
        Overloaded: the queue is full.
    """

    def __init__(
        self, engine: TokenEngine, ask: Ask, decode: Decode, stop: Sequence[str], tell: Callable[[str | Ended], None]
    ) -> None:  # fmt: skip
        self._engine, self._tell = engine, tell
        self._text = TextStream(decode, stop)
        self._tokens = 0
        self._over = False
        self._number: int | None = None
        self._number = engine.submit(ask, self._hear)
        if self._text.stopped:  # it stopped before it had a number
            engine.cancel(self._number)

    def cancel(self) -> None:
        """End the request; nothing happens if it has ended."""
        assert self._number is not None
        self._engine.cancel(self._number)

    def _hear(self, event: Event) -> None:
        if self._over:
            return
        if isinstance(event, Token):
            self._tokens += 1
            self._say(self._text.add(event.id))
            if self._text.stopped:
                self._end(Done("stop"))
                if self._number is not None:
                    self._engine.cancel(self._number)
            return
        self._say(self._text.end())
        self._end(event)

    def _say(self, piece: str) -> None:
        if piece:
            self._tell(piece)

    def _end(self, done: Done) -> None:
        self._over = True
        self._tell(Ended(done.reason, self._tokens, done.message))
