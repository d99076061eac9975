"""Export the prefill/decode pair, its policy, its report and its card at the end of fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from pdtrim_pl.data import fingerprint
from pdtrim_pl.evaluation.summary import Summary, summarise
from pdtrim_pl.evaluation.timing import Timing, measure_timing
from pdtrim_pl.export import check_target, export_pair
from pdtrim_pl.export.documents import write_documents
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.staged.model import kv_shape_of

log = logging.getLogger(__name__)


class ExportPair(Callback):
    """At the end of fit: measures what was gained and what it cost, exports the pair, prints the table.

    Args:
        output: the directory to make.
        dtype: element type of the exported weights and of the KV on the wire.
        overwrite: replace an earlier export there; else the run fails before its first step.
        measure: whether to measure quality on the validation part and times; without it the report has no table.
        prompt_tokens: length of the prompt for times and bytes.
        new_tokens: tokens generated for the decode time.
    """

    def __init__(
        self,
        output: Path,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        overwrite: bool = False,
        measure: bool = True,
        prompt_tokens: int = 256,
        new_tokens: int = 32,
    ) -> None:
        if prompt_tokens < 1 or new_tokens < 1:
            raise ValueError("`prompt_tokens` and `new_tokens` of the export must be at least 1.")
        self.output = output
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.overwrite = overwrite
        self.measure = measure
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_target(self.output, self.overwrite)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if trainer.interrupted:
            log.warning("The run was interrupted: nothing is exported. Continue it with `--ckpt_path`.")
            return
        if trainer.is_global_zero:
            self._export(trainer, pl_module)
        trainer.strategy.barrier("export")

    def _export(self, trainer: Trainer, module: PDTrimModule) -> None:
        self._note(trainer, module)
        summary = self._summary(trainer, module) if self.measure else None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        log.info("Writing the pair and comparing it with the student.")
        target = export_pair(
            module.student, self.output, tokenizer=None if data is None else data.tokenizer, dtype=self.dtype,
            overwrite=self.overwrite,
            extras=lambda folder: write_documents(
                folder, module.student, module.record, summary, target=self.output, dtype=self.dtype
            ),
        )  # fmt: skip
        if summary is not None:
            summary.at(target).render_text(Console())
        log.info("Exported to %s.", target)

    def _note(self, trainer: Trainer, module: PDTrimModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module.record.notes |= {
            "precision": str(trainer.precision), "strategy": type(trainer.strategy).__name__,
            "processes": trainer.world_size, "optimizer steps": module.global_step, "configuration": module.run_config,
        }  # fmt: skip
        if data is not None:
            module.record.notes["calibration sha256"] = fingerprint(data.calibration_dataloader())

    def _summary(self, trainer: Trainer, module: PDTrimModule) -> Summary:
        log.info("Measuring the teacher, the teacher's weights after the drops, and the student.")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with evaluating(module) as (student, teacher):
            return summarise(
                student, teacher, data.val_dataloader(), timing=self._timing(module), device=module.device,
                kv_prompt_tokens=self.prompt_tokens, kv_shape=kv_shape_of(student.model, self.dtype),
                export=self.output,
            )  # fmt: skip

    def _timing(self, module: PDTrimModule) -> Timing:
        # The teacher's weights under the student's plan: one model, one element type, so the ratio is of blocks alone.
        return measure_timing(
            module.teacher, plan=module.plan, policy=module.policy, prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )  # fmt: skip
