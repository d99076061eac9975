"""A merge at a fixed place of a run, for the runs whose merges no search shall choose."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.merging import Merging, fit_runs
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import Target
from pdtrim_pl.strategies import check_merges, parallel_of

Merges = Mapping[int, tuple[Target, tuple[int, ...]]]
"""Per epoch, from 0: the stage(s) and the neighbours that become one."""


def pairs_of(trainer: Trainer) -> list[Batch]:
    """The calibration set in batches of two, whatever the batch size of a process."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    examples = [data.part("calibration")[index] for index in range(len(data.part("calibration")))]
    return [Collator(data.pad_id)(examples[first : first + 2]) for first in range(0, len(examples), 2)]


class MergeAt(Callback):
    """Fits and makes the merges of an epoch at its start, without a search."""

    def __init__(self, merges: Merges, settings: Merging) -> None:
        self.merges, self.settings = merges, settings

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_merges(trainer.strategy, self.settings.tied)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if trainer.current_epoch not in self.merges:
            return
        target, run = self.merges[trainer.current_epoch]
        with evaluating(pl_module) as (student, teacher):
            parallel = parallel_of(trainer.strategy)
            gather = None if parallel.whole else parallel.whole_weights
            (fitted,) = fit_runs(
                student, teacher, pairs_of(trainer), target, [run], self.settings, gather=gather
            ).runs  # fmt: skip
            student.offer([fitted])
        pl_module.apply_plan(self.settings.apply(pl_module.plan, fitted.move, criterion="manual"))
