"""Correct the progress of Lightning's loops in a checkpoint, so that a continued run calls every hook."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from lightning.pytorch import Trainer

from pdtrim_pl.compat import LoopProgress as At


def resumable_loops(loops: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The `loops` of a checkpoint, such that a run continued from it calls every hook that is still to come.

    If a checkpoint is saved at the end of the last batch of an epoch, Lightning 2.6 treats this epoch as finished and
    the next one as started. The continued run then skips the validation of this epoch and `on_train_epoch_start` of the
    next one, so a round of drops would be lost silently. This function changes such a checkpoint: it says that the run
    is before the first batch of validation or, if no validation is due, at the end of the epoch. Other checkpoints are
    not changed.
    """
    fit = loops.get(At.FIT)
    if fit is None or not _after_last_batch(fit):
        return loops
    loops = deepcopy(loops)
    fit = loops[At.FIT]
    for count in ("total", "current"):
        fit[At.BATCHES][count]["completed"] += 1
    if _validation_is_due(trainer):
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        fit[At.VALIDATION_BATCHES] |= {"total": begun, "current": dict(begun), "is_last_batch": False}
    else:
        fit[At.EPOCH_STATE][At.STEPPED] += 1
        for count in ("total", "current"):
            fit[At.EPOCHS][count]["processed"] += 1
    return loops


def _after_last_batch(fit: dict[str, Any]) -> bool:
    batches, epochs = fit[At.BATCHES], fit[At.EPOCHS]["total"]
    done = batches["total"]
    in_batch_end = done["ready"] == done["processed"] == done["completed"] + 1
    in_epoch = epochs["started"] == epochs["processed"] + 1
    return bool(batches["is_last_batch"]) and in_batch_end and in_epoch


def _validation_is_due(trainer: Trainer) -> bool:
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or every is None or (trainer.current_epoch + 1) % every:
        return False
    return interval is None or interval == float("inf") or trainer.num_training_batches % interval == 0
