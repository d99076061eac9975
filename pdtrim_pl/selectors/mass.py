"""Selectors that decide block by block: send everything, or leave out positions that get little attention."""

from __future__ import annotations

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Retention
from pdtrim_pl.selectors.base import KVSelector, SelectionContext


class NoSelector(KVSelector):
    """Sends everything. `first` and `last` only set which attention mass the report shows."""

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        return {}


class MassSelector(KVSelector):
    """Trims every block whose attention mass on the kept positions is at least `threshold`.

    Args:
        threshold: share of the attention to the prompt, in [0, 1].
        first: see `KVSelector`.
        last: see `KVSelector`.

    Raises:
        UserError: a threshold, count or share out of range.
    """

    def __init__(self, threshold: float = 0.9, first: int | float = 4, last: int | float = 0.2) -> None:
        super().__init__(first, last)
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"`threshold` is {threshold!r}: give a share of the attention mass, from 0 to 1.")
        self.threshold = threshold

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        return {block: self.rule for block in context.plan.decode if context.mass[block] >= self.threshold}
