"""Distillation after another method."""

from __future__ import annotations

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.method import Found, Method


class Distilled(Method):
    """Trains what another method left, on what that one left of the token budget.

    Args:
        start: name of that method.
    """

    def __init__(self, start: str) -> None:
        super().__init__(start)

    @property
    @override
    def trains(self) -> bool:
        return True

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        return bench.distil(start, bench.training.tokens - start.trained_tokens)
