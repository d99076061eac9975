"""What a test hears of requests to an engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask, Done, Event, Logits, Token


class Heard:
    """Collects what is told of one request."""

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self.tokens: list[int] = []
        self.logits: Tensor | None = None
        self.done: queue.Queue[Done] = queue.Queue()
        self.first = threading.Event()
        self.number = engine.submit(ask, self.hear)

    def hear(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(event.id)
            self.first.set()
        elif isinstance(event, Logits):
            self.logits = torch.from_numpy(event.values)
        else:
            self.done.put(event)

    def end(self, timeout: float = 60.0) -> Done:
        return self.done.get(timeout=timeout)


def together(engine: Engine, asks: Sequence[Ask]) -> list[tuple[Heard, Done]]:
    """Serve requests at once; returns what was heard of each, and how it ended."""
    heard = [Heard(engine, ask) for ask in asks]
    return [(each, each.end()) for each in heard]
