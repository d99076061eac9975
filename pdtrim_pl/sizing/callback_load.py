"""What a callback needs while it works: memory, for `pdtrim fit --dry_run`, and a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lightning.pytorch import Callback

from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.plan import Stage
from pdtrim_pl.selectors import SelectorLoad

EVERY_BLOCK = 10**9
"""In `CallbackLoad.untied`: however many blocks the model has."""


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
    without_teacher: str = ""
    """What to do in a run that loads no teacher; empty if it runs none."""
    writes_weights: bool = False
    """Whether it writes fitted weights into blocks."""
    untied: Mapping[Stage, int] = field(default_factory=lambda: MappingProxyType({}))
    """Per stage: number of blocks that may get weights of their own, at most; `EVERY_BLOCK` for all."""
    prefill_drops: int = 0
    """Number of blocks that it drops from prefill alone, at most."""
    refits_kv_only: bool = False
    """Whether it refits the projections of blocks that prefill has dropped alone."""


class TellsLoad(ABC):
    """Base class of callbacks that need more memory than training and validation."""

    @abstractmethod
    def load(self) -> CallbackLoad:
        """What this callback needs under its settings."""


def check_callbacks(callbacks: Sequence[Callback], *, offline: bool, adapters: bool) -> None:
    """Refuse callbacks that cannot work in a run.

    Args:
        callbacks: those of the run.
        offline: whether no teacher is loaded.
        adapters: whether adapters train beside frozen blocks.

    Raises:
        UserError: one of them cannot work. The message names all of these.
    """
    loads = [(type(callback).__name__, callback.load()) for callback in callbacks if isinstance(callback, TellsLoad)]
    runs = [f"{name} ({load.without_teacher})" for name, load in loads if load.without_teacher]
    if offline and runs:
        raise UserError(
            f"`teacher.placement: offline` loads no teacher, and these callbacks run it: {'; '.join(runs)}. Leave them "
            "out, or use `teacher.placement: copy`."
        )
    if adapters and (writing := [name for name, load in loads if load.writes_weights]):
        raise UserError(
            f"{', '.join(writing)} would write fitted weights into blocks (`merging`, `repair`, `width`, "
            "`refit_examples`), and "
            "`trainable: lora` trains adapters that were made for the old ones. Use `trainable: all`, or drop blocks "
            "without fitting others."
        )
