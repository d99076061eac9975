"""The cost of a search: seconds, and the number of (token, block) passes, counted by hooks on the blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.gate import Gate, current_pass


@dataclass(frozen=True)
class Spent:
    """Cost of a search, without training."""

    seconds: float = 0.0
    block_tokens: int = 0
    """Number of (token, block) passes over real tokens. A forward pass counts once, a backward pass twice. Projections
    of KV-only blocks are not counted."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.block_tokens + other.block_tokens)


class Meter:
    """Measures the cost of the students that it watches, while it is running."""

    def __init__(self) -> None:
        self._running = False
        self._seconds = 0.0
        self._started = 0.0
        self._block_tokens = 0

    @property
    def spent(self) -> Spent:
        """The cost so far."""
        now = time.perf_counter() - self._started if self._running else 0.0
        return Spent(self._seconds + now, self._block_tokens)

    def watch(self, student: StagedCausalLM) -> None:
        """Count the passes of a student's blocks from now on."""
        for gate in student.gates.values():
            gate.register_forward_pre_hook(self._count)

    def add(self, spent: Spent) -> None:
        """Add a cost that was not measured."""
        self._seconds += spent.seconds
        self._block_tokens += spent.block_tokens

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure inside the `with` block."""
        with self._switched(True):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not measure inside the `with` block."""
        with self._switched(False):
            yield

    @contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        before = self._running
        self._set(on)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, on: bool) -> None:
        self._seconds = self.spent.seconds
        self._running, self._started = on, time.perf_counter()

    def _count(self, gate: nn.Module, _: tuple[Any, ...]) -> None:
        assert isinstance(gate, Gate)
        current = current_pass()
        reached = current.resume is None or gate.index >= current.resume.block
        if self._running and reached and gate.index in current.runs:
            passes = 3 if torch.is_grad_enabled() else 1  # with gradients, a backward pass will follow
            self._block_tokens += passes * int(current.tokens.valid.sum())
