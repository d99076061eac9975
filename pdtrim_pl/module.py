"""The LightningModule: it builds teacher and student, distils the student, and measures it.

The base classes measure it (`evaluation/measured.py`), and save and resume a run (`checkpoints/resumable.py`).
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
from pdtrim_pl.data import Batch, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.measured import MeasuredModule
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_step
from pdtrim_pl.losses import KL, Distilled, LossTerm, check_terms, training_loss
from pdtrim_pl.losses.pair import run_pair
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import Loading, dtype_of, warn_of_slow_bf16
from pdtrim_pl.models.placement import Placement, TeacherPlace
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Structure
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate, stop_ids_of
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.strategies import check_freezing, check_masters, check_strategy, check_trainable, parallel_of
from pdtrim_pl.strategies.schedule import Schedule
from pdtrim_pl.teacher_cache import OfflineTeacher


class PDTrimModule(MeasuredModule):
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
        teacher: where the teacher lives: a copy, or on disk. Its name is in `loading`.
        trainable: `all` weights; those of blocks that stand for several (`merged`); the `norms`; or low-rank adapters
            (`lora`, or their settings), which an export merges.

    Raises:
        UserError: a setting is invalid.
    """

    teacher: StagedCausalLM
    """Absent under `teacher.placement: offline`."""

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
        teacher: TeacherPlace = TeacherPlace(),
        trainable: Trainable | LoRA = "all",
    ) -> None:
        super().__init__()
        self.model_name = model
        self.losses = [KL()] if losses is None else list(losses)
        check_terms(self.losses)
        self.place = teacher
        self.trainable: Trainable | LoRA = LoRA() if trainable == "lora" else trainable
        self.offline: OfflineTeacher | None = None
        """The teacher on disk, while a run with `teacher.placement: offline` trains."""
        if chunk_tokens < 1:
            raise UserError(f"`chunk_tokens` is {chunk_tokens}: give at least 1.")
        if schedule is not None and lr_scheduler is not None:
            raise UserError("`schedule` and `lr_scheduler` both set the learning rate: give one of them.")
        self.optimizer_of, self.schedule, self.lr_scheduler_of = optimizer, schedule, lr_scheduler
        self.structure, self.loading, self.chunk_tokens = structure, loading, chunk_tokens
        check_adapter(architecture)
        self.architecture = architecture
        self._checked = False

    @property
    @override
    def parallel(self) -> Parallel:
        return Parallel() if self._trainer is None else parallel_of(self._trainer.strategy)

    @property
    def pair(self) -> ModelPair:
        """Settings of the models that are loaded."""
        return ModelPair(self.model_name, self.structure, self.loading, self.architecture)

    @property
    @override
    def is_alone(self) -> bool:
        return self.placement == "offline"

    @property
    def placement(self) -> Placement:
        """Where the teacher lives."""
        if self.place.placement != "auto":
            return self.place.placement
        return "copy" if self.place.cache is None else "offline"

    def check_teacher(self, reader: str, way_out: str) -> None:
        """Refuse something that runs the teacher in a run that has none.

        Args:
            reader: what runs the teacher, for the message.
            way_out: what to do instead, for the message.

        Raises:
            UserError: the teacher is offline.
        """
        if self.placement == "offline":
            raise UserError(
                f"{reader} runs the teacher, and under `teacher.placement: offline` none is loaded. {way_out}, or use "
                "`teacher.placement: copy`."
            )

    def check_whole(self, writer: str) -> None:
        """Refuse something that writes weights of blocks in a run that trains adapters beside them.

        Args:
            writer: what writes weights, for the message.

        Raises:
            UserError: adapters train.
        """
        if isinstance(self.trainable, LoRA):
            raise UserError(
                f"{writer} writes fitted weights into blocks, and `trainable: lora` trains adapters that were made for "
                "the old ones. Use `trainable: all` or `merged`, or drop blocks without fitting others."
            )

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
        check_trainable(self.trainer.strategy, self.trainable)
        if stage == "fit":
            self._check_masters(dtype_of(self.loading.dtype))
        check_same_checkpoint(self.parallel, self.found_checkpoint)
        if "student" not in self._modules:
            self.check_models()  # not in `configure_model`, where ZeRO-3 shards every model that is built
        if stage == "fit" and self.placement == "offline":
            self.offline = self._offline_teacher()
        save_nothing_in_a_trial(self.trainer)
        self.run_name = self.trainer.strategy.broadcast(uuid4().hex)

    @override
    def configure_model(self) -> None:
        if "student" in self._modules:
            return
        model, plan, policy = self.pair.student()
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._check_masters(model.dtype)  # `auto` is resolved
        vocabulary: int = model.config.vocab_size
        teacher = None if self.placement == "offline" else self.pair.teacher(plan.boundary, vocabulary)
        if self._trainer is not None and self._trainer.is_global_zero:
            device, precision = self._trainer.strategy.root_device, str(self._trainer.precision)
            dtypes = [model.dtype] if teacher is None else [model.dtype, teacher.model.dtype]
            warn_of_slow_bf16(device, *dtypes, precision)
        self.student = StagedCausalLM(model, architecture=self.architecture).train()
        compared = self.pair.compared_tokens() if teacher is None else teacher.compared_tokens
        self.student.compared_tokens = compared
        self._untie(plan.untied)
        self.student.apply_plan(plan)
        self.student.apply_policy(policy)
        self.student.gradient_checkpointing = self.loading.gradient_checkpointing
        if self.loading.freeze_embeddings:
            self.student.freeze_embeddings()
        if self._trainer is None or not self._trainer.strategy.restore_checkpoint_after_setup:
            # DeepSpeed must be set up with the same parameters in every run: there `on_fit_start` freezes.
            self.student.train_only(self.trainable)
        if teacher is not None:
            self.teacher = teacher
        data = self._data()
        if data is not None:
            data.check_fits(model.config)

    def _check_masters(self, dtype: torch.dtype | None) -> None:
        """Refuse training in 16 bits alone. Frozen weights may have any type: adapters are in fp32."""
        adapters = isinstance(self.trainable, LoRA)
        check_masters(self.trainer.strategy, str(self.trainer.precision), None if adapters else dtype)

    def _offline_teacher(self) -> OfflineTeacher:
        data = self._data()
        if data is None:
            raise UserError(
                "`teacher.placement: offline` finds the teacher's distributions by the examples of a "
                "PromptResponseDataModule, and this run has none. Use one, or `teacher.placement: copy`."
            )
        assert self.place.cache is not None, "`TeacherPlace` refuses this"
        found = OfflineTeacher(self.place.cache, self.pair, data, self.losses)
        data.on_batch = lambda batch: found.fetch(batch) if self.trainer.training else None
        return found

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
        terms = self.losses if self.offline is None else self.offline.terms
        loss, values = training_loss(terms, self.distilled(batch), chunk_tokens=self.chunk_tokens)
        if not loss.requires_grad:
            raise UserError(
                "`trainable` leaves nothing that trains: no block of the plan stands for several others. Merge blocks "
                "before the first step, start from a plan with merges (`structure.plan`), or use `trainable: all`."
            )
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch[0]))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        self.note_loss(loss.detach())
        return loss

    def distilled(self, batch: Batch) -> Distilled:
        """Run student and teacher on one batch, and collect the input of the losses."""
        batch, min_chunks = shared_step(self.parallel, batch, self.chunk_tokens)
        if self.offline is not None:
            return self.offline.distilled(self.student, batch, min_chunks)
        return run_pair(
            self.student, self.teacher, batch, watch_blocks=any(term.watches_blocks for term in self.losses),
            keep_caches=any(term.reads_caches for term in self.losses), min_chunks=min_chunks,
        )  # fmt: skip

    # Generation

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


@contextmanager
def evaluating(module: PDTrimModule) -> Iterator[tuple[StagedCausalLM, StagedCausalLM]]:
    """Student and teacher in eval mode, without gradients, in the trainer's precision. Restores the mode at the end."""
    with eval_mode(module.student), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        yield module.student, module.teacher
