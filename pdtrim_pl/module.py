"""The LightningModule: it builds teacher and student, distils the student, and measures it.

The base classes place the teacher (`teacher/placed.py`), measure the student (`evaluation/measured.py`), save and
resume a run (`checkpoints/resumable.py`), and step the optimizer (`strategies/stepping.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import check_same_checkpoint
from pdtrim_pl.checkpoints.fast_dev_run import save_nothing_in_a_trial
from pdtrim_pl.data import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_step
from pdtrim_pl.losses import KL, Distilled, LossTerm, check_terms, training_loss
from pdtrim_pl.losses.pair import run_pair
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.liger import use_liger
from pdtrim_pl.models.loading import Loading, dtype_of, warn_of_slow_bf16
from pdtrim_pl.models.placement import TeacherPlace
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Structure
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate, stop_ids_of
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.staged.rows import RowCounts
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.strategies import check_freezing, check_masters, check_strategy, check_trainable, parallel_of
from pdtrim_pl.strategies.flags import StepFlags
from pdtrim_pl.strategies.layer_rates import LayerRates
from pdtrim_pl.strategies.schedule import Schedule
from pdtrim_pl.strategies.stepping import SteppedModule
from pdtrim_pl.teacher.placed import PlacedModule


class PDTrimModule(SteppedModule, PlacedModule):
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
        teacher: where the teacher lives: a copy, the student's own weights, or on disk. Its name is in `loading`.
        trainable: `all` weights; those of blocks that stand for several (`merged`); the `norms`; or low-rank adapters
            (`lora`, or their settings), which an export merges.
        layer_rates: lower learning rates for blocks far from what the plan changed. By default all have the same.

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
        layer_rates: LayerRates | None = None,
    ) -> None:
        super().__init__(teacher, trainable)
        self.losses = [KL()] if losses is None else list(losses)
        check_terms(self.losses)
        if chunk_tokens < 1:
            raise UserError(f"`chunk_tokens` is {chunk_tokens}: give at least 1.")
        if schedule is not None and lr_scheduler is not None:
            raise UserError("`schedule` and `lr_scheduler` both set the learning rate: give one of them.")
        self.optimizer_of, self.schedule, self.lr_scheduler_of = optimizer, schedule, lr_scheduler
        self.layer_rates = layer_rates
        self.model_name, self.loading = loading.pinned(model)
        self.structure, self.chunk_tokens = structure, chunk_tokens
        check_adapter(architecture)
        self.architecture = architecture
        self._checked = False
        self.flags = StepFlags()
        """What the ranks agree on at every optimizer step."""

    @property
    @override
    def parallel(self) -> Parallel:
        return Parallel() if self._trainer is None else parallel_of(self._trainer.strategy)

    @property
    @override
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
        self.flags = StepFlags()
        check_strategy(self.trainer.strategy, stage)
        check_freezing(self.trainer.strategy, self.loading.freeze_embeddings)
        check_trainable(self.trainer.strategy, self.trainable)
        self._check_kernels()
        self._check_teacher_bits()
        if stage == "fit":
            self._check_masters(dtype_of(self.loading.dtype))
        check_same_checkpoint(self.parallel, self.found_checkpoint)
        if "student" not in self._modules:
            self.check_models()  # not in `configure_model`, where ZeRO-3 shards every model that is built
        if stage == "fit":
            self._check_callbacks()
            self._watch_batches()
            if self.is_alone:
                self._open_cache()
        save_nothing_in_a_trial(self.trainer)
        self.run_name = self.trainer.strategy.broadcast(uuid4().hex)

    @override
    def configure_model(self) -> None:
        if "student" in self._modules:
            return
        model, plan, policy = self.pair.student()
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._check_masters(model.dtype)  # `auto` is resolved
        if self.loading.liger:
            use_liger(model)
        self.student = StagedCausalLM(model, architecture=self.architecture).train()
        self._untie(plan.untied)
        self.student.apply_plan(plan)
        self.student.apply_policy(policy)
        self.student.gradient_checkpointing = self.loading.gradient_checkpointing
        if self.loading.freeze_embeddings:
            self.student.freeze_embeddings()
        if self._trainer is None or not self._trainer.strategy.restore_checkpoint_after_setup:
            # DeepSpeed must be set up with the same parameters in every run: there `on_fit_start` freezes.
            self.student.train_only(self.trainable)
        teacher = self._loaded_teacher(self.student)
        if teacher is not None:
            self.teacher = teacher
        if self._trainer is not None and self._trainer.is_global_zero:
            device, precision = self._trainer.strategy.root_device, str(self._trainer.precision)
            warn_of_slow_bf16(device, model.dtype, (teacher or self.student).model.dtype, precision)
        data = self._data()
        if data is not None:
            data.check_fits(model.config)

    def _check_masters(self, dtype: torch.dtype | None) -> None:
        """Refuse training in 16 bits alone. Frozen weights may have any type: adapters are in fp32."""
        adapters = isinstance(self.trainable, LoRA)
        check_masters(self.trainer.strategy, str(self.trainer.precision), None if adapters else dtype)

    @override
    def train(self, mode: bool = True) -> PDTrimModule:
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()
        return self

    # Training

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.losses if self.offline is None else self.offline.terms
        counts, self._counts = self._counts, None
        loss, values = training_loss(terms, self.distilled(batch, counts), chunk_tokens=self.chunk_tokens)
        if not loss.requires_grad:
            raise UserError(
                "`trainable` leaves nothing that trains: no block of the plan stands for several others. Merge blocks "
                "before the first step, start from a plan with merges (`structure.plan`), or use `trainable: all`."
            )
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch[0]))
        self.log("train/loss", loss.detach(), batch_size=len(batch[0]))
        if self.read_loss is not None:
            self.log("loss", self.read_loss, prog_bar=True, logger=False, batch_size=1)
        self.note_loss(loss.detach())
        return loss

    def distilled(self, batch: Batch, counts: RowCounts | None = None) -> Distilled:
        """Run student and teacher on one batch, and collect the input of the losses.

        Args:
            batch: requests with known responses.
            counts: numbers of real tokens of the batch, if the host knows them.
        """
        # In fp16, backward computes the logits of each chunk again, and gathers the heads for each.
        gather = self.parallel.gathers_heads and not str(self.trainer.precision).startswith("16")
        if gather:
            batch, min_chunks = batch.with_decode(), 0
        else:
            batch, min_chunks = shared_step(self.parallel, batch, self.chunk_tokens, counts)
        if self.offline is not None:
            return self.offline.distilled(self.student, batch, min_chunks, counts, gather)
        return run_pair(
            self.student, self.teacher, batch, watch_blocks=any(term.watches_blocks for term in self.losses),
            keep_caches=any(term.reads_caches for term in self.losses), min_chunks=min_chunks, counts=counts,
            common=self._common(), gather_heads=gather,
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
