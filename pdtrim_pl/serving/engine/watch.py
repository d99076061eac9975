"""Counts and times of an engine's requests, as Prometheus reads them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import get_args

from pdtrim_pl.serving.engine.requests import Reason, Running

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the buckets of a histogram, seconds."""


COUNTERS = {
    "kv_bytes": "Bytes of keys and values that crossed.",
    "header_bytes": "Other bytes of the transfers.",
    "prompt_tokens": "Tokens of prompts.",
    "tokens": "Tokens of responses.",
    "refused": "Requests that found the queue full.",
    "lost": "Transfers that were refused or lost.",
    "restarts": "Workers that died.",
}
"""Name of a counter -> what it counts."""


class Histogram:
    """Times in buckets, with their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self._counts[next((at for at, end in enumerate(BUCKETS) if seconds <= end), len(BUCKETS))] += 1
        self._sum += seconds

    def lines(self, name: str, text: str) -> Iterator[str]:
        """The histogram in the text format."""
        yield from (f"# HELP {name} {text}", f"# TYPE {name} histogram")
        total = 0
        for end, count in zip([*map(str, BUCKETS), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{end}"}} {total}'
        yield from (f"{name}_sum {self._sum:.6f}", f"{name}_count {total}")


class Watch:
    """Hears what happens to requests. Its methods may be called from any thread.

    Args:
        unknown: names of `COUNTERS` that this engine cannot count.
    """

    def __init__(self, unknown: Collection[str] = ()) -> None:
        self._lock = threading.Lock()
        self._unknown = unknown
        self._first, self._each, self._prefill = Histogram(), Histogram(), Histogram()
        self._ended: Counter[Reason] = Counter(dict.fromkeys(get_args(Reason), 0))
        self._counts: Counter[str] = Counter()
        self._waiting = self._decoding = 0

    def queued(self, waiting: int, decoding: int) -> None:
        """How many requests wait, and how many decode."""
        with self._lock:
            self._waiting, self._decoding = waiting, decoding

    def encoded(self, kv_bytes: int, header_bytes: int, seconds: float) -> None:
        """A prompt was handed over."""
        with self._lock:
            self._counts["kv_bytes"] += kv_bytes
            self._counts["header_bytes"] += header_bytes
            self._prefill.add(seconds)

    def first_token(self, seconds: float) -> None:
        """A response began, so long after its request."""
        with self._lock:
            self._first.add(seconds)

    def ended(self, running: Running, reason: Reason) -> None:
        """A request ended."""
        with self._lock:
            self._ended[reason] += 1
            self._counts["prompt_tokens"] += len(running.ask.prompt_ids)
            self._counts["tokens"] += running.tokens
            if running.first is not None and running.tokens > 1:
                self._each.add((time.monotonic() - running.first) / (running.tokens - 1))

    def refused(self) -> None:
        """A request found the queue full."""
        with self._lock:
            self._counts["refused"] += 1

    def lost(self) -> None:
        """A transfer was refused or lost."""
        with self._lock:
            self._counts["lost"] += 1

    def restarted(self) -> None:
        """A worker died."""
        with self._lock:
            self._counts["restarts"] += 1

    def metrics(self) -> str:
        """Everything in Prometheus's text format."""
        with self._lock:
            return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield from self._first.lines("pdtrim_ttft_seconds", "Time from a request to its first token.")
        yield from self._each.lines("pdtrim_tpot_seconds", "Mean time of each further token of a request.")
        yield from self._prefill.lines("pdtrim_prefill_seconds", "Time of a prefill pass.")
        yield from _lines("pdtrim_requests_waiting", "gauge", "Requests in the queue.", [("", self._waiting)])
        yield from _lines("pdtrim_requests_decoding", "gauge", "Requests that decode.", [("", self._decoding)])
        ended = [(f'{{reason="{reason}"}}', count) for reason, count in self._ended.items()]
        yield from _lines("pdtrim_requests_total", "counter", "Requests that ended, by the reason.", ended)
        for name, text in COUNTERS.items():
            if name not in self._unknown:
                yield from _lines(f"pdtrim_{name}_total", "counter", text, [("", self._counts[name])])


def _lines(name: str, kind: str, text: str, values: Sequence[tuple[str, int]]) -> Iterator[str]:
    yield from (f"# HELP {name} {text}", f"# TYPE {name} {kind}")
    yield from (f"{name}{labels} {value}" for labels, value in values)
