"""Trial runs (`trainer.fast_dev_run`): they run a few batches to test a configuration, and save nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


def trial_batches(trainer: Trainer) -> int | None:
    """Number of batches of each data part in a trial; None in a real run."""
    return int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]


def limited(batches: Iterable[Any], trainer: Trainer) -> list[Any]:
    """All batches; in a trial, the first few."""
    return list(islice(batches, trial_batches(trainer)))


def save_nothing_in_a_trial(trainer: Trainer) -> None:
    """Remove the callbacks that save checkpoints from a trial.

    Lightning's ModelCheckpoint with `save_last` saves at the end of training even in a trial. A later run that
    continues from `last` would then continue the trial.
    """
    if trial_batches(trainer) is None:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    log.info("A trial (`trainer.fast_dev_run`): no checkpoint, no journal and no export is written.")
