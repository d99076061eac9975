"""Exports the prefill/decode pair with its policy, report and card at the end of fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from typing_extensions import override

from callbacks.removal_rounds import removals_of
from pdtrim_pl.checkpoints.fast_dev_run import trial_batches
from pdtrim_pl.checkpoints.state import check_writable
from pdtrim_pl.data import fingerprint
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.summary import Summary, summarise
from pdtrim_pl.evaluation.timing import Timing, measure_timing
from pdtrim_pl.export import check_target, export_pair
from pdtrim_pl.export.documents import write_documents
from pdtrim_pl.export.merged import without_adapters
from pdtrim_pl.export.origin import Origin
from pdtrim_pl.export.own_widths import check_own_widths
from pdtrim_pl.export.verify import sliced_stage
from pdtrim_pl.export.whole import whole_copy
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.liger import use_liger
from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.parallel import on_first_rank
from pdtrim_pl.plan import STAGES, ExportWidths, Layout
from pdtrim_pl.sizing.callback_load import CallbackLoad, TellsLoad
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of
from pdtrim_pl.strategies import parallel_of

log = logging.getLogger(__name__)


class ExportPair(Callback, TellsLoad):
    """Measures quality and times, exports the pair and prints the summary, at the end of fit.

    In a trial (`trainer.fast_dev_run`) it only checks its settings.

    Args:
        output: the directory to create.
        dtype: element type of the exported weights and of the KV on the wire.
        overwrite: replace an earlier export there. Without it the run fails before its first step if there is one. A
            run that was killed after its export and continues may always replace its own.
        measure: measure quality on the validation part, and times; without it the report has no summary.
        prompt_tokens: length of the prompt for times and bytes.
        new_tokens: tokens generated for the decode time.
        layout: `padded` gives both checkpoints equally many blocks, for engines that pair them by position.
        widths: `uniform` makes all blocks of a checkpoint as wide as the widest. `per_block` gives each its own width;
            transformers builds that for few families, and a run of another one is refused before its first step.
    """

    def __init__(
        self,
        output: Path,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        overwrite: bool = False,
        measure: bool = True,
        prompt_tokens: int = 256,
        new_tokens: int = 32,
        layout: Layout = "compact",
        widths: ExportWidths = "uniform",
    ) -> None:
        if prompt_tokens < 1 or new_tokens < 1:
            raise UserError("`prompt_tokens` and `new_tokens` of the export must be at least 1.")
        self.output = output
        self.dtype = TORCH_DTYPES[dtype]
        self.overwrite = overwrite
        self.measure = measure
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.layout: Layout = layout
        self.widths: ExportWidths = widths
        self._exported = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._exported = trial_batches(trainer) is not None  # which writes nothing, so nothing is in its way
        if stage == "fit" and not self._exported:
            check_target(self.output, self.overwrite, Origin.of(self.output))  # no checkpoint has said yet who we are
            if trainer.is_global_zero:
                check_writable(self.output.resolve().parent)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if not self._exported and not trainer.strategy.restore_checkpoint_after_setup:
            check_target(self.output, self.overwrite, _origin(trainer, pl_module))
        if self.widths == "per_block":
            student = pl_module.student
            check_own_widths(student.model.config, type(student.model), student.architecture)
        if not self.measure:
            return
        context = usable_context(pl_module.student.model.config.to_dict())
        if self.prompt_tokens + self.new_tokens > context:
            raise MisconfigurationException(
                f"`prompt_tokens: {self.prompt_tokens}` and `new_tokens: {self.new_tokens}` of ExportPair exceed the "
                f"context of `model`, {context} tokens. Lower them."
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data is None or not data.val_dataloader():
            raise MisconfigurationException(
                "ExportPair measures quality on a validation part, and there is none. Set `data.parts.validation`, or "
                "`measure: false`."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if not self._exported:
            check_target(self.output, self.overwrite, _origin(trainer, pl_module))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export_once(trainer, pl_module)  # while the weights are still where they were trained

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export_once(trainer, pl_module)  # a run that was continued after its last step trains no more

    @override
    def load(self) -> CallbackLoad:
        way_out = "set `measure: false` and measure with `pdtrim eval`" if self.measure else ""
        return CallbackLoad(untrained_student=self.measure, without_teacher=way_out)

    def _export_once(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PDTrimModule)
        if trainer.interrupted:
            log.warning("The run was interrupted: nothing is exported. Continue it with `--ckpt_path`.")
            return
        if self._exported:
            return
        self._exported = True
        undone = [
            (drops.title, epoch) for drops in removals_of(trainer) for epoch in drops.epochs if epoch not in drops.done
        ]
        if undone:
            log.warning("The run ended before these rounds (what, epoch): %s. Exporting the plan so far.", undone)
        parallel = parallel_of(trainer.strategy)
        summary: Summary | None = None
        student: StagedCausalLM | None = module.student
        if not parallel.whole:  # what needs every rank
            summary = self._summary(trainer, module) if self.measure else None
            student = whole_copy(module.student, parallel.whole_weights, keep=trainer.is_global_zero)

        def export() -> None:
            assert student is not None
            measured = self._summary(trainer, module) if self.measure and parallel.whole else summary
            self._write(trainer, module, without_adapters(student), measured)

        on_first_rank(parallel, export)

    def _write(self, trainer: Trainer, module: PDTrimModule, student: StagedCausalLM, summary: Summary | None) -> None:
        self._note(trainer, module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        log.info("Writing the pair and comparing it with the student.")
        target = export_pair(
            student, self.output, tokenizer=None if data is None else data.tokenizer, dtype=self.dtype,
            overwrite=self.overwrite, origin=_origin(trainer, module), layout=self.layout, widths=self.widths,
            extras=lambda folder: write_documents(folder, module.record, summary, target=self.output),
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
            base = _untrained(module)
            return summarise(
                student, teacher, data.val_dataloader(), base=base, timing=self._timing(trainer, module, base),
                device=module.device, kv_prompt_tokens=self.prompt_tokens,
                kv_shape=kv_shape_of(student.model, self.dtype), export=self.output,
            )  # fmt: skip

    def _timing(self, trainer: Trainer, module: PDTrimModule, base: StagedCausalLM) -> Timing | None:
        if not parallel_of(trainer.strategy).whole:
            log.info("No times: with sharded weights they would be those of gathering. Time the export instead.")
            return None
        # One model in one element type under both plans, so the ratio is of blocks alone.
        plan = replace(module.plan, untied={})
        narrow = {stage for stage in STAGES if plan.widths[stage]}
        if "prefill" in narrow and plan.kv_only:
            log.info("No times: a narrow prefill stage with KV-only blocks runs only as an export. Time that.")
            return None
        models = {stage: sliced_stage(base, plan, stage) if stage in narrow else base for stage in STAGES}
        for stage in narrow if module.loading.liger else ():
            use_liger(models[stage].model)
        return measure_timing(
            base, plan=plan, policy=module.policy, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens,
            sliced=models,
        )  # fmt: skip


def _origin(trainer: Trainer, module: PDTrimModule) -> Origin:
    return Origin(module.run_name, trainer.max_epochs, trainer.max_steps)


def _untrained(module: PDTrimModule) -> StagedCausalLM:
    """The student as it was before training. It has the teacher's weights, unless these are others or in 8 bits."""
    if module.loading.teacher in (None, module.model_name) and module.loading.teacher_bits is None:
        return module.teacher
    attention, adapter = module.loading.attn_implementation, module.architecture
    model = load_causal_lm(module.model_name, attn_implementation=attention, architecture=adapter)
    return StagedCausalLM(model, architecture=adapter).to(module.device).eval()
