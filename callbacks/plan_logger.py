"""Logs changes of the plan and the progress of the run."""

from __future__ import annotations

import logging
import time
from math import inf, isfinite
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from pdtrim_pl.errors import UserError
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, Stage, StagePlan

log = logging.getLogger(__name__)


class PlanLogger(Callback):
    """Logs every drop with its score, the number of blocks per stage as metrics, and lines of progress.

    Args:
        every_seconds: seconds between two lines of progress; 0 turns them off.

    Raises:
        UserError: a negative time.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        if every_seconds < 0:
            raise UserError(f"`every_seconds` is {every_seconds}: give a time >= 0.")
        self.every_seconds = every_seconds
        self._said = -1
        self._last = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if len(pl_module.plan.history) != self._said:
            first = self._said < 0
            self._report(trainer, pl_module.plan, since=0 if first else self._said)
            self._said = len(pl_module.plan.history)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_seconds or time.monotonic() - self._last < self.every_seconds:
            return
        self._last = time.monotonic()
        _say(
            "epoch %d/%s, batch %d/%s: loss %.4f",
            trainer.current_epoch + 1, trainer.max_epochs, batch_idx + 1, trainer.num_training_batches,
            float(outputs["loss"]),
        )  # fmt: skip

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if "val/ppl" in metrics:
            _say(
                "validation: perplexity %.2f (teacher %.2f), KL %.4f, top-1 agreement %.3f",
                *(float(metrics[f"val/{name}"]) for name in ("ppl", "teacher_ppl", "kl", "agreement")),
            )

    def _report(self, trainer: Trainer, plan: StagePlan, since: int) -> None:
        narrowed: dict[str, list[float]] = {}
        for entry in plan.history[since:]:
            if entry.action == "narrow":  # every block of a stage at once
                line = f"{entry.stage}: %d block(s) keep {entry.left} {entry.part} each ({entry.criterion}%s)"
                narrowed.setdefault(line, []).append(inf if entry.score is None else entry.score)
                continue
            score = "unscored" if entry.score is None else f"{entry.score:.4g}"
            _say("%s: %s block %d (%s %s)", entry.stage, entry.action, entry.block, entry.criterion, score)
        for line, scores in narrowed.items():
            mean = sum(scores) / len(scores)
            _say(line, len(scores), f", mean error {mean:.4g}" if isfinite(mean) else "")
        _say("blocks: %s", describe(plan))
        for logger in trainer.loggers:
            counts = {f"plan/{stage}_blocks": float(len(plan.blocks(stage))) for stage in STAGES}
            counts |= {f"plan/{s}_{part}": float(wide) for s in STAGES for part, wide in plan.widest(s).items()}
            logger.log_metrics(counts, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("plan", f"`{plan.to_json()}`", trainer.global_step)


def describe(plan: StagePlan) -> str:
    """How many blocks each stage runs, and how wide: `prefill 27/30, decode 24/30 of 1126 channels`."""
    return ", ".join(
        f"{stage} {len(plan.blocks(stage))}/{plan.model.num_blocks}{_wide(plan, stage)}" for stage in STAGES
    )


def _wide(plan: StagePlan, stage: Stage) -> str:
    widths = " and ".join(f"{wide} {part}" for part, wide in plan.widest(stage).items())
    return f" of {widths}" if widths else ""


@rank_zero_only
def _say(message: str, *values: object) -> None:
    log.info(message, *values)
