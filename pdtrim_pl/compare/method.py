"""The base of every method that a comparison has a row for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.errors import UserError


class Method(ABC):
    """One method, with a row for every count. A subclass writes `find`.

    Args:
        start: name of the method whose result at the same count this one starts from; it must come earlier in
            `methods`. Its cost counts as this one's too.
    """

    def __init__(self, start: str | None = None) -> None:
        self.start = start

    @property
    def continues(self) -> bool:
        """Whether `find` starts from this method's own result at the count before, as a greedy choice may."""
        return False

    @property
    def trains(self) -> bool:
        """Whether the result depends on the `training` settings."""
        return False

    @abstractmethod
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        """Remove `count` blocks per stage that the method touches.

        Args:
            bench: model, teacher, calibration text, training, and the costs' meter, which runs meanwhile.
            start: the result of `start` at this count, or the method's own at the count before if it `continues`;
                None where there is neither.
            count: blocks to remove, those that `start` has removed included.
        """


def check_only_drops(start: Found, name: str | None) -> None:
    """Refuse to search on from a result that is more than dropped blocks.

    Raises:
        UserError: weights that are no longer the model's own, or merged blocks.
    """
    if start.weights or any(start.plan.merged.values()):
        raise UserError(
            f"`start: {name}` trains or merges blocks, and a search begins with the model's own weights. Start from a "
            "method that only drops blocks."
        )
