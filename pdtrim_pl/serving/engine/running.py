"""The requests of an engine that have not ended, and what its workers report of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.requests import Done, Logits, Reason, Running, Token
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair


class RunningRequests:
    """Requests in the order of their numbers. The engine's thread alone changes them; any thread may count.

    Args:
        pair: what serves them.
        watch: hears what happens to them.
    """

    def __init__(self, pair: ExportedPair, watch: Watch) -> None:
        self._pair, self._watch = pair, watch
        self._lock = threading.Lock()
        self._all: dict[int, Running] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Running]:
        """All of them as they are now; they may end meanwhile."""
        return iter(list(self._all.values()))

    def count(self, state: str) -> int:
        """How many are in a state."""
        with self._lock:
            return sum(running.state == state for running in self._all.values())

    def find(self, number: int | None) -> Running | None:
        """A request that has not ended."""
        return None if number is None else self._all.get(number)

    def add(self, running: Running) -> None:
        """Take up a request."""
        with self._lock:
            self._all[running.number] = running

    def tokens(self, report: say.Tokens) -> None:
        """Pass on tokens from decode."""
        now = time.monotonic()
        for number, token in report.tokens:
            running = self.find(number)
            if running is None or running.over is not None:
                continue
            if running.first is None:
                running.first = now
                self._watch.first_token(now - running.began)
            running.decoded(1, int(report.seconds is not None), report.seconds or 0.0)
            running.tell(Token(token))
            if number in report.ended:
                self.finish(running, "stop" if token in running.ask.stop_ids else "length")

    def logits(self, report: say.Logits) -> None:
        """Pass on the logits of a known response."""
        running = self.find(report.request)
        if running is not None and running.over is None:
            running.decoded(len(report.values), report.steps, report.seconds)
            running.tell(Logits(report.values))
            self.finish(running, "length")

    def encoded(self, report: say.Encoded) -> None:
        """Note that a prompt was handed over."""
        self._watch.encoded(report.kv_bytes, report.header_bytes, report.seconds)
        if (running := self.find(report.request)) is not None:
            running.state, running.encoded = "decode", report
            self.reported(running)

    def reported(self, running: Running) -> None:
        """Wait no longer for prefill's report of a request."""
        running.reporting = False
        if running.over is not None:
            self.end(running, *running.over)

    def finish(self, running: Running, reason: Reason, message: str = "") -> None:
        """End a request. If decode has answered, prefill's report is on its way: wait for it, it has the figures."""
        if running.reporting and running.tokens:
            running.over = running.over or (reason, message)
        else:
            self.end(running, reason, message)

    def end(self, running: Running, reason: Reason, message: str = "") -> None:
        """End a request now. One whose response was complete ends as it was."""
        reason, message = running.over or (reason, message)
        with self._lock:
            self._all.pop(running.number, None)
        self._watch.ended(running, reason)
        running.tell(Done(reason, message, running.stats(self._pair)))
