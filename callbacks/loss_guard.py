"""Stops a run, or skips a step, when the training loss is not finite."""

from __future__ import annotations

import logging
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from pdtrim_pl.checkpoints.fast_dev_run import trial_batches
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.strategies import check_skipping

log = logging.getLogger(__name__)


class LossGuard(Callback):
    """Checks every loss before the optimizer steps; the weights never learn from one that is NaN or infinite.

    The losses of a step are read from the device at once. The first batch with a bad one is saved with its loss as
    `step{N}-rank{R}.pt` in `output`, for `torch.load`. Gradients are averaged over all ranks, so every rank acts alike,
    even if its own losses are finite.

    Args:
        skip: how many optimizer steps of a run may be skipped, with all their accumulated batches; the next one stops
            the run.
        output: where batches are saved; by default `bad_batches` in `trainer.default_root_dir`.

    Raises:
        UserError: a negative `skip`.
    """

    def __init__(self, skip: int = 0, output: Path | None = None) -> None:
        if skip < 0:
            raise UserError(f"`skip` of the loss guard is {skip}: give a count >= 0.")
        self.skip = skip
        self.output = output
        self.skipped: list[int] = []
        self._batch: Batch | None = None
        self._losses: list[tuple[Batch, Tensor]] = []
        """The batches of the step that is under way, with their losses."""

    @property
    @override
    def state_key(self) -> str:
        return "LossGuard"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_skipping(trainer.strategy, self.skip)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        self._losses = []
        pl_module.flags.ask("loss", self._any_is_bad)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._batch = batch

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._batch is not None
        self._losses.append((self._batch, loss.detach()))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, PDTrimModule)
        answers = pl_module.flags.at_step(trainer)
        if answers is None:
            return
        losses, self._losses = self._losses, []
        if not answers["loss"]:
            return
        mine = [(batch, value) for batch, value in ((b, float(each)) for b, each in losses) if not isfinite(value)]
        # Only now that every rank knows: one that cannot write must not keep the others waiting.
        lost = self._save(trainer, *mine[0]) if mine and trial_batches(trainer) is None else ""
        if len(self.skipped) >= self.skip:
            shown = mine[0][1] if mine else float(losses[-1][1])
            raise UserError(self._farewell(trainer, shown, lost))
        if lost:
            log.warning("The batch of a loss that is not finite could not be saved: %s", lost)
        self.skipped.append(trainer.global_step)
        optimizer.zero_grad(set_to_none=True)  # an optimizer leaves weights without a gradient as they are
        log.warning("The loss is not finite: step %d is skipped (%d of %d).", trainer.global_step, len(self.skipped),
                    self.skip)  # fmt: skip

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._batch = None

    def _any_is_bad(self) -> Tensor | bool:
        losses = [loss for _, loss in self._losses]
        return ~torch.stack(losses).isfinite().all() if losses else False

    def _folder(self, trainer: Trainer) -> Path:
        return self.output or Path(trainer.default_root_dir) / "bad_batches"

    def _save(self, trainer: Trainer, batch: Batch, loss: float) -> str:
        """Save the batch. Returns why it could not be saved, or an empty text."""
        folder = self._folder(trainer)
        facts = {
            "batch": {name: tensor.cpu() for name, tensor in batch._asdict().items()}, "loss": loss,
            "step": trainer.global_step, "epoch": trainer.current_epoch, "rank": trainer.global_rank,
        }  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(facts, folder / f"step{trainer.global_step}-rank{trainer.global_rank}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            return f"{error}"
        return ""

    def _farewell(self, trainer: Trainer, loss: float, lost: str) -> str:
        seen = f" {len(self.skipped)} step(s) were skipped before." if self.skipped else ""
        where = f"could not be saved ({lost})" if lost else f"is in {self._folder(trainer)}"
        if trial_batches(trainer) is not None:
            where = "is not saved: this is a trial"
        return (
            f"The training loss of a rank is not finite (here {loss}) at step {trainer.global_step}, epoch "
            f"{trainer.current_epoch}.{seen} The weights are as they were, the batch {where}. "
            "Lower the learning rate or look at the batch, then continue with `--ckpt_path`; `skip` of LossGuard "
            "passes over a few."
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = list(state_dict["skipped"])
