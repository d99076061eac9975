"""The LightningModule: it builds teacher and student, distils the student, and measures it.

Saving and resuming is in the base class, `checkpoints/resumable.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import check_same_checkpoint
from pdtrim_pl.checkpoints.fast_dev_run import save_nothing_in_a_trial
from pdtrim_pl.checkpoints.resumable import ResumableModule
from pdtrim_pl.data import Batch, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.metrics import QualityMeans
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_step
from pdtrim_pl.losses import KL, Distilled, LossTerm, check_terms, training_loss
from pdtrim_pl.losses.pair import run_pair
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import Loading, dtype_of, warn_of_slow_bf16
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Structure
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate, stop_ids_of
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.strategies import check_freezing, check_masters, check_strategy, parallel_of
from pdtrim_pl.strategies.schedule import Schedule


class PDTrimModule(ResumableModule):
    """Distils a student, whose stages lose blocks, from a frozen teacher that keeps all blocks.

    Args:
        model: name, path or Hub id of the model to trim; `smollm2-135m` is embedded.
        losses: weighted list of losses; forward KL by default.
        optimizer: makes an optimizer from parameters.
        lr_scheduler: makes a scheduler from an optimizer, stepped after every optimizer step, in place of `schedule`.
        structure: relation, boundary, and the plan and policy files to start from.
        loading: element types, teacher, attention implementation, gradient checkpointing.
        chunk_tokens: number of response tokens whose logits are in memory at once.
        architecture: adapter of the model's family, if the package has none. A teacher of this family uses it too.
        schedule: how the learning rate rises and falls over the run. By default it is constant.

    Raises:
        UserError: a setting is invalid.
    """

    teacher: StagedCausalLM

    def __init__(
        self,
        model: str,
        losses: list[LossTerm] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        structure: Structure = Structure(),
        loading: Loading = Loading(),
        chunk_tokens: int = 256,
        architecture: Architecture | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model
        self.losses = [KL()] if losses is None else list(losses)
        check_terms(self.losses)
        if chunk_tokens < 1:
            raise UserError(f"`chunk_tokens` is {chunk_tokens}: give at least 1.")
        if schedule is not None and lr_scheduler is not None:
            raise UserError("`schedule` and `lr_scheduler` both set the learning rate: give one of them.")
        self.optimizer_of, self.schedule, self.lr_scheduler_of = optimizer, schedule, lr_scheduler
        self.structure, self.loading, self.chunk_tokens = structure, loading, chunk_tokens
        check_adapter(architecture)
        self.architecture = architecture
        self._checked = False
        self._means: QualityMeans | None = None

    @property
    @override
    def parallel(self) -> Parallel:
        return Parallel() if self._trainer is None else parallel_of(self._trainer.strategy)

    @property
    def pair(self) -> ModelPair:
        """Settings of the models that are loaded."""
        return ModelPair(self.model_name, self.structure, self.loading, self.architecture)

    # Building

    def check_models(self) -> None:
        """Refuse models that cannot be trimmed or are incomplete, before data is tokenised and weights are read.

        Raises:
            UserError: see `ModelPair.check`.
        """
        if not self._checked:
            self.pair.check()
            self._checked = True

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy, stage)
        check_freezing(self.trainer.strategy, self.loading.freeze_embeddings)
        if stage == "fit":
            check_masters(self.trainer.strategy, str(self.trainer.precision), dtype_of(self.loading.dtype))
        check_same_checkpoint(self.parallel, self.found_checkpoint)
        if "student" not in self._modules:
            self.check_models()  # not in `configure_model`, where ZeRO-3 shards every model that is built
        save_nothing_in_a_trial(self.trainer)
        self.run_name = self.trainer.strategy.broadcast(uuid4().hex)

    @override
    def configure_model(self) -> None:
        if "student" in self._modules:
            return
        model, plan, policy = self.pair.student()
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_masters(self._trainer.strategy, str(self._trainer.precision), model.dtype)  # `auto` is resolved
        teacher = self.pair.teacher(plan.boundary, model.config.vocab_size)
        if self._trainer is not None and self._trainer.is_global_zero:
            device, precision = self._trainer.strategy.root_device, str(self._trainer.precision)
            warn_of_slow_bf16(device, model.dtype, teacher.model.dtype, precision)
        self.student = StagedCausalLM(model, architecture=self.architecture).train()
        self.student.compared_tokens = teacher.compared_tokens
        self._untie(plan.untied)
        self.student.apply_plan(plan)
        self.student.apply_policy(policy)
        self.student.gradient_checkpointing = self.loading.gradient_checkpointing
        if self.loading.freeze_embeddings:
            self.student.freeze_embeddings()
        if self._trainer is None or not self._trainer.strategy.restore_checkpoint_after_setup:
            # DeepSpeed must be set up with the same parameters in every run: there `on_fit_start` freezes.
            self.student.freeze_unused()
        self.teacher = teacher
        data = self._data()
        if data is not None:
            data.check_fits(model.config)

    def _data(self) -> PromptResponseDataModule | None:
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        return data if isinstance(data, PromptResponseDataModule) else None

    @override
    def train(self, mode: bool = True) -> PDTrimModule:
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()
        return self

    # Training

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_of(self.optimized_parameters())
        if self.schedule is not None:
            scheduler: LRScheduler = self.schedule.over(self.trainer.estimated_stepping_batches, optimizer)
        elif self.lr_scheduler_of is not None:
            scheduler = self.lr_scheduler_of(optimizer)
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and free the gradients: Lightning keeps them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, values = training_loss(self.losses, self.distilled(batch), chunk_tokens=self.chunk_tokens)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch[0]))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        self.note_loss(loss.detach())
        return loss

    def distilled(self, batch: Batch) -> Distilled:
        """Run student and teacher on one batch, and collect the input of the losses."""
        batch, min_chunks = shared_step(self.parallel, batch, self.chunk_tokens)
        return run_pair(
            self.student, self.teacher, batch, watch_blocks=any(term.watches_blocks for term in self.losses),
            keep_caches=any(term.reads_caches for term in self.losses), min_chunks=min_chunks,
        )  # fmt: skip

    # Evaluation

    @override
    def on_validation_epoch_start(self) -> None:
        self._means = QualityMeans(self.device)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._log_quality("val")
        if not self.trainer.sanity_checking:
            self.record.validations.append((self.global_step, values))

    @override
    def on_test_epoch_start(self) -> None:
        self._means = QualityMeans(self.device)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_quality("test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate responses greedily, [B, at most R]. A row that has ended repeats its stop token."""
        # The stop tokens of the tokenizer are needed too: the model may not know the end of a chat's turn.
        data = self._data()
        stop_ids = stop_ids_of(self.student.model, None if data is None else data.tokenizer)
        return generate(
            self.student, batch.prompt_ids, batch.prompt_mask, max_new_tokens=batch.response_ids.shape[1],
            stop_ids=stop_ids,
        )  # fmt: skip

    def _measure(self, batch: Batch) -> None:
        assert self._means is not None
        batch, min_chunks = shared_step(self.parallel, batch, self.chunk_tokens)
        self._means.measure(self.student, self.teacher, batch, self.chunk_tokens, min_chunks)

    def _log_quality(self, prefix: str) -> dict[str, float]:
        assert self._means is not None
        values = self._means.compute()
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        return values


@contextmanager
def evaluating(module: PDTrimModule) -> Iterator[tuple[StagedCausalLM, StagedCausalLM]]:
    """Student and teacher in eval mode, without gradients, in the trainer's precision. Restores the mode at the end."""
    with eval_mode(module.student), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        yield module.student, module.teacher
