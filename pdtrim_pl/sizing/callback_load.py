"""The memory that a callback needs while it works, for `pdtrim fit --dry_run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.selectors import SelectorLoad


@dataclass(frozen=True)
class CallbackLoad:
    """What one callback needs on the models' device while it works."""

    search: SearchMemory | None = None
    """Memory limits of its search; None if it does not search."""
    merging: Merging | None = None
    """Settings of its local fits; None if it merges no blocks."""
    fitted_at_once: int = 0
    """Number of blocks that its local fits train at once."""
    narrowed_on: int | None = None
    """Number of training examples on which it makes blocks narrower; 0 for the calibration set, None if it does not."""
    widths_offered: int = 0
    """Number of widths that its search tries at once. Each needs a refitted layer in every block."""
    selection: SelectorLoad | None = None
    """What its KV selector keeps and runs, within the limits of the run's searches; None if it chooses no policy."""
    untrained_student: bool = False
    """Whether it measures the student's weights as they were before training. Usually they are the teacher's weights.
    If the teacher is another model, they are loaded again, whole, on every process."""


class TellsLoad(ABC):
    """Base class of callbacks that need more memory than training and validation."""

    @abstractmethod
    def load(self) -> CallbackLoad:
        """What this callback needs under its settings."""
