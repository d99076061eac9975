"""A trial, `trainer.fast_dev_run`: a few batches show whether a configuration works, and nothing is left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


def trial_batches(trainer: Trainer) -> int | None:
    """Batches that a trial takes of every data set; None in a real run."""
    return int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]


def limited(batches: Iterable[Any], trainer: Trainer) -> list[Any]:
    """All batches, or the first few in a trial."""
    return list(islice(batches, trial_batches(trainer)))


def save_nothing_in_a_trial(trainer: Trainer) -> None:
    """Take the callbacks that save checkpoints out of a trial.

    Lightning's ModelCheckpoint with `save_last` saves at the end of training even then, and a run that continues from
    `last` would go on from the trial.
    """
    if trial_batches(trainer) is None:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    log.info("A trial (`trainer.fast_dev_run`): no checkpoint, no journal and no export is written.")
