"""A run that stops at scripted moments until it is sent a notice; `tests/test_slurm.py` names these in its YAML.

Which moments is in the environment: `PDTRIM_TEST_PAUSES` holds a folder for the marks, then moments as RESTART=NAME.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.preemption import NOTICES
from pdtrim_pl.criteria import GreedyKL, ScoringContext
from pdtrim_pl.plan import StagePlan, Target


def pause(moment: str) -> None:
    """Leave a mark with the number of this process, and wait for a notice, which stays pending."""
    folder, *moments = os.environ.get("PDTRIM_TEST_PAUSES", "").split(" ")
    if f"{os.environ.get('SLURM_RESTART_COUNT', '0')}={moment}" not in moments:
        return
    mark = Path(folder) / f"{moment}.{os.environ['SLURM_PROCID']}"
    unfinished = mark.with_suffix(".unfinished" + mark.suffix)
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(mark)
    received = signal.sigtimedwait(NOTICES, 90)
    assert received is not None, f"no notice at {moment}"
    signal.raise_signal(received.si_signo)


class Pauses(Callback):
    """Pauses in the first step and in the middle of the last epoch."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            pause("first_step")
        if trainer.current_epoch == 2 and batch_idx == 1:
            pause("last_epoch")


class PausedSearch(GreedyKL):
    """Pauses in the search, on rank 1 alone."""

    @override
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        scores = super().score(context, plan, target, candidates)
        if os.environ.get("SLURM_PROCID") == "1":
            pause("search")
        return scores
