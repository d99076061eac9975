"""The base class of the methods in a comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.errors import UserError


class Method(ABC):
    """One method. It has one row for every count. A subclass implements `find`.

    Args:
        start: name of the method whose result at the same count this method starts from. It must come earlier in
            `methods`. Its cost is added to the cost of this method.
    """

    def __init__(self, start: str | None = None) -> None:
        self.start = start

    @property
    def continues(self) -> bool:
        """Whether `find` starts from the method's own result at the next smaller count. Greedy choices may do so."""
        return False

    @property
    def trains(self) -> bool:
        """Whether the result depends on the `training` settings."""
        return False

    @abstractmethod
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        """Remove `count` blocks from each stage that the method trims. The cost is measured meanwhile.

        Args:
            bench: model, teacher, texts and training.
            start: the result of `start` at this count, or the method's own result at the next smaller count if it
                `continues`; None if there is neither.
            count: number of blocks to remove, including those that `start` has removed.
        """


class ReadsTrainingText(Method):
    """A method that reads some training text without gradient steps.

    Args:
        start: see `Method`.
        tokens: tokens of training text that it reads; with 0 it reads the calibration set.
    """

    def __init__(self, start: str | None, tokens: int) -> None:
        super().__init__(start)
        self.tokens = tokens

    @property
    @override
    def trains(self) -> bool:
        return self.tokens > 0


def check_only_drops(start: Found, name: str | None) -> None:
    """Refuse a result as the start of a search if it does more than drop blocks.

    Raises:
        UserError: the result has changed weights or merged blocks.
    """
    if start.weights or any(start.plan.merged.values()):
        raise UserError(
            f"`start: {name}` trains or merges blocks, but a search needs the model's own weights. Start from a "
            "method that only drops blocks."
        )
