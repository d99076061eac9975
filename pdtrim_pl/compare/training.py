"""Distillation of one row, with the package's own module and a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from pdtrim_pl.compare.settings import Subject, Training
from pdtrim_pl.data import Batch
from pdtrim_pl.models.loading import warn_of_slow_bf16
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies.layer_rates import LayerRates

log = logging.getLogger(__name__)


class _Lines(Callback):
    """Logs the loss, ten times per training."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, steps = trainer.global_step, int(trainer.max_steps)
        if step % max(steps // 10, 1) == 0:
            log.info("  step %d of %d: loss %.4f", step, steps, float(trainer.callback_metrics["train/loss"]))


def distil(
    student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], training: Training, subject: Subject,
    folder: Path, rate: float = 1.0, layer_rates: LayerRates | None = None,
) -> Mapping[str, Tensor]:  # fmt: skip
    """Train a student on every batch once.

    Args:
        student: the student in float32, under its plan and policy.
        teacher: the teacher.
        batches: the batches; each is one optimizer step.
        training: optimizer, schedule, losses and precision.
        subject: the model, for its device.
        folder: root folder of Lightning.
        rate: factor of the optimizer's learning rate.
        layer_rates: further factors by block; None for none.

    Returns:
        The trained weights by name, on the CPU.
    """
    steps = len(batches)
    module = PDTrimModule(
        subject.name, training.losses, training.optimizer,
        lr_scheduler=lambda optimizer: training.schedule(optimizer, steps, rate), layer_rates=layer_rates,
    )  # fmt: skip
    warn_of_slow_bf16(subject.device, training.precision)
    if training.freeze_embeddings:
        student.freeze_embeddings()
    # `configure_model` does not replace a student that is already there.
    module.student, module.teacher = student.train(), teacher
    trainer = Trainer(
        accelerator="gpu" if subject.device.type == "cuda" else "cpu",
        devices=1,
        precision=training.precision,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=training.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[_Lines()],
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)  # for dropout, if the model has any
        warnings.filterwarnings("ignore", "You defined a `validation_step`")  # validation is the judge's work
        warnings.filterwarnings("ignore", "Found .* in eval mode")  # the teacher is in eval mode on purpose
        trainer.fit(module, DataLoader(list(batches), batch_size=None, shuffle=False))  # type: ignore[arg-type]
    return {name: p.detach().cpu() for name, p in student.named_parameters() if p.requires_grad}
