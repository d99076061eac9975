"""The text of a response while its tokens come, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdtrim_pl.errors import UserError

UNFINISHED = "\ufffd"
"""What tokenizers write for the first bytes of a character while its last bytes are missing."""
CONTEXT = 8
"""Tokens before a new one that are decoded with it: the text of a token depends on those before it."""
WINDOW = 32
"""Tokens after which the window moves on."""
Decode = Callable[[list[int]], str]
"""From token ids to their text."""


class TextStream:
    """Turns tokens into text. The joined pieces are the text of all tokens, or of what stands before a stop string.

    Only a window of the last tokens is decoded, so a long response costs no more per token than a short one. The bytes
    of an unfinished character wait until the character is complete, and so does what may be the start of a stop string.

    Args:
        decode: from token ids to their text.
        stop: texts that end the response; they are no part of it.

    Raises:
        UserError: a stop string is empty.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("`stop` has an empty text: leave it out.")
        self._decode, self._stop = decode, tuple(stop)
        self._window: list[int] = []
        self._known = 0
        """Characters of the window's text that have been taken."""
        self._held = ""
        self.stopped = False
        """Whether a stop string was found. No text comes after it."""

    def add(self, token: int) -> str:
        """The text that is certain once this token is there; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        finished = text.rstrip(UNFINISHED)
        piece = finished[self._known :]
        self._known = max(self._known, len(finished))
        if len(self._window) > WINDOW and finished == text:
            self._window = self._window[-CONTEXT:]
            self._known = len(self._decode(self._window))
        return self._until_stop(piece)

    def end(self) -> str:
        """What is left when no token comes any more."""
        rest = self._until_stop(self._decode(self._window)[self._known :] if self._window else "")
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
