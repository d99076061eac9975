"""What a callback says that it will hold in memory, for `pdtrim fit --dry_run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging


@dataclass(frozen=True)
class CallbackLoad:
    """What one callback holds on the models' device while it works."""

    search: SearchMemory | None = None
    """How much its search keeps; None if it does not search."""
    merging: Merging | None = None
    """How it fits merged blocks; None if it fits none."""
    fitted_at_once: int = 0
    """Blocks that its local fits train at a time."""
    untrained_student: bool = False
    """Whether it measures the student's weights as they were before training. They are the teacher's, unless the
    teacher is another model: then they are loaded again, whole, on every process."""


class TellsLoad(ABC):
    """Base of callbacks that need memory besides that of training and validation."""

    @abstractmethod
    def load(self) -> CallbackLoad:
        """What this callback holds under its settings."""
