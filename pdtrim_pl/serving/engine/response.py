"""The text of one response of the engine, piece by piece."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdtrim_pl.serving.engine.interface import TokenEngine
from pdtrim_pl.serving.engine.requests import Ask, Done, Event, Token
from pdtrim_pl.serving.text import Decode, TextStream


@dataclass(frozen=True)
class Ended(Done):
    """The end of a response."""

    tokens: int = 0
    """Tokens of the response, the stop token included."""


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
        self._number: int | None = None
        self._number = engine.submit(ask, self._hear)
        if self._text.stopped:  # it stopped before it had a number
            engine.cancel(self._number)

    def cancel(self) -> None:
        """End the request; nothing happens if it has ended."""
        assert self._number is not None
        self._engine.cancel(self._number)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Token):
            if self._text.stopped:  # tokens that were on their way
                return
            self._tokens += 1
            self._say(self._text.add(event.id))
            if self._text.stopped and self._number is not None:
                self._engine.cancel(self._number)
        elif isinstance(event, Done):
            self._say(self._text.end())
            if self._text.stopped:
                self._tell(Ended("stop", stats=event.stats, tokens=self._tokens))
            else:
                self._tell(Ended(event.reason, event.message, event.stats, self._tokens))

    def _say(self, piece: str) -> None:
        if piece:
            self._tell(piece)


class Heard:
    """Collects what is told of one response. It is an iterator over the pieces of text; the last item is the end."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[str | Ended] = queue.SimpleQueue()
        self.put = self._queue.put

    def __iter__(self) -> Iterator[str | Ended]:
        while True:
            event = self._queue.get()
            yield event
            if isinstance(event, Ended):
                return
