"""The LightningModule: a frozen teacher, a student under a stage plan, and the losses between them.

Shapes: B batch, P prompt tokens, R response tokens, N response tokens without padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import check_same_checkpoint, settle
from pdtrim_pl.checkpoints.loop_state import resumable_loops
from pdtrim_pl.checkpoints.random_state import RandomState, random_states, restore_random_state
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.checkpoints.state import CheckpointState, check_weights, check_writable
from pdtrim_pl.checkpoints.trial import save_nothing_in_a_trial
from pdtrim_pl.data import Batch, PromptResponseDataModule, check_context, check_vocabulary
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.teacher import teacher_states
from pdtrim_pl.evaluation.tokens import final_hidden, score_tokens
from pdtrim_pl.losses import KL, Distilled, LossTerm, check_terms, distillation_loss, token_weights, weighted_sum
from pdtrim_pl.merging.training import WeightChange
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.loading import Loading, dtype_of
from pdtrim_pl.models.pretrained import check_model, load_causal_lm, model_type_of
from pdtrim_pl.plan import KVRetentionPolicy, Stage, StagePlan, Structure
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.decoding import stop_ids_of
from pdtrim_pl.staged.model import reference_to
from pdtrim_pl.staged.observed import BlockOutputs, run_observed
from pdtrim_pl.strategies import (
    check_freezing,
    check_strategy,
    forget_gradients,
    gathered,
    largest,
    ranks_of,
    shards_weights,
)
from pdtrim_pl.strategies.masters import check_masters

RANDOM_STATES = "pdtrim_random"
"""Key of the random generators of every process in a checkpoint."""


class PDTrimModule(LightningModule):
    """Distils a student whose stages lose blocks from a teacher that keeps them.

    Args:
        model: name, path or Hub id of the model to trim; `smollm2-135m` is embedded.
        losses: weighted list of losses; forward KL by default.
        optimizer: from parameters to an optimizer.
        lr_scheduler: from an optimizer to a scheduler that is stepped after every optimizer step; constant by default.
        structure: relation, boundary, and files to start from.
        loading: element types, teacher, attention, gradient checkpointing.
        chunk_tokens: response tokens whose logits are alive at a time.
        architecture: adapter of the model's family, where the package has none; it serves a teacher of that family too.
    """

    student: StagedCausalLM
    teacher: StagedCausalLM

    def __init__(
        self,
        model: str,
        losses: list[LossTerm] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        structure: Structure = Structure(),
        loading: Loading = Loading(),
        chunk_tokens: int = 128,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the teacher is never in a checkpoint; `check_weights` is strict about the rest
        self.model_name = model
        self.losses = [KL()] if losses is None else list(losses)
        check_terms(self.losses)
        if chunk_tokens < 1:
            raise UserError(f"`chunk_tokens` is {chunk_tokens}: give at least 1.")
        self.optimizer_of, self.lr_scheduler_of = optimizer, lr_scheduler
        self.structure, self.loading = structure, loading
        self.chunk_tokens = chunk_tokens
        check_adapter(architecture)
        self.architecture = architecture
        self.record = RunRecord()
        self.run_config = ""
        self.found_checkpoint: str | Path | None = None
        """What this process found for `--ckpt_path last`; the processes compare it before they load anything."""
        self.run_name = ""
        """A random one for every new run; a continued run has that of its checkpoint."""
        self._checked = False
        self._unrecorded: tuple[int, Tensor] | None = None
        self._random: RandomState | None = None
        self._means: dict[str, MeanMetric] = {}
        self._added: list[tuple[Stage, int]] = []
        """Blocks that got weights of their own in a stage after the optimizer was made, in that order."""

    # Structure

    @property
    def plan(self) -> StagePlan:
        """The student's stage plan."""
        return self.student.plan

    @property
    def policy(self) -> KVRetentionPolicy | None:
        """The student's KV retention policy; None sends everything."""
        return self.student.policy

    def apply_plan(self, plan: StagePlan) -> None:
        """Train under `plan` from now on; what it adds to the history goes into the run's record.

        Merges that the student was offered fitted weights for get them, and the optimizer forgets what it knew of the
        weights that they replace; new weights join its first group.
        """
        known, before = len(self.plan.history), self._own_weights()
        change = None if self._trainer is None else WeightChange(self._trainer.strategy)
        self.student.apply_plan(plan, None if change is None else change.write)
        self.student.freeze_unused()
        if self._trainer is not None:
            forget_gradients(self._trainer.strategy)
        added = [key for key in self._own_weights() if key not in before]
        self._added += added
        if change is not None:
            change.finish(self._weights_of(added))
        self.record.removals += [(self.global_step, removal) for removal in plan.history[known:]]

    def _own_weights(self) -> list[tuple[Stage, int]]:
        """Blocks with weights of their own in a stage."""
        return [(stage, index) for stage, blocks in self.student.untied.items() for index in blocks]

    def _weights_of(self, own: Iterable[tuple[Stage, int]]) -> list[nn.Parameter]:
        gates = self.student.gates
        return [parameter for stage, index in own for parameter in gates[index].untied[stage].parameters()]

    def apply_policy(self, policy: KVRetentionPolicy | None) -> None:
        """Train under `policy` from now on."""
        self.student.apply_policy(policy)

    def check_models(self) -> None:
        """Refuse models that cannot be trimmed or are not whole, before anything is tokenised or a weight is read.

        Raises:
            UserError: see `load_causal_lm`.
        """
        if self._checked:
            return
        check_model(self.model_name, self.architecture)
        if self.loading.teacher not in (None, self.model_name):
            check_model(self.loading.teacher, self._adapter_of_teacher())
        self._checked = True

    def _adapter_of_teacher(self) -> Architecture | None:
        """That of the model, unless the package knows the teacher as one of another family."""
        teacher = self.loading.teacher
        if self.architecture is None or teacher is None or model_type_of(teacher) == model_type_of(self.model_name):
            return self.architecture
        return None

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy, stage)
        check_freezing(self.trainer.strategy, self.loading.freeze_embeddings)
        if stage == "fit":
            check_masters(self.trainer.strategy, str(self.trainer.precision), dtype_of(self.loading.dtype))
        check_same_checkpoint(ranks_of(self.trainer.strategy), self.found_checkpoint)
        if "student" not in self._modules:
            self.check_models()  # not in `configure_model`, where ZeRO-3 would have its way with it
        save_nothing_in_a_trial(self.trainer)
        self.run_name = self.trainer.strategy.broadcast(uuid4().hex)

    @override
    def configure_model(self) -> None:
        if "student" in self._modules:
            return
        plan = StagePlan.load(self.structure.plan) if self.structure.plan else None
        policy = KVRetentionPolicy.load(self.structure.policy, plan) if self.structure.policy else None
        loading = self.loading
        student = load_causal_lm(
            self.model_name, dtype=dtype_of(loading.dtype), attn_implementation=loading.attn_implementation,
            architecture=self.architecture,
        )  # fmt: skip
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_masters(self._trainer.strategy, str(self._trainer.precision), student.dtype)  # `auto` is known now
        adapter = self._adapter_of_teacher()
        teacher = load_causal_lm(
            loading.teacher or self.model_name, dtype=dtype_of(loading.teacher_dtype),
            attn_implementation=loading.attn_implementation, architecture=adapter,
        )  # fmt: skip
        _check_same_vocabulary(student.config.vocab_size, teacher.config.vocab_size)
        reference = reference_to(student, self.model_name)
        plan = plan or StagePlan.full(reference, self.structure.relation, self.structure.boundary)
        if plan.model.model_type == reference.model_type and plan.model.num_blocks == reference.num_blocks:
            plan = replace(plan, model=reference)  # a plan file may name its model by another path
        self.student = StagedCausalLM(student, architecture=self.architecture).train()
        self._untie(plan.untied)
        self.student.apply_plan(plan)
        self.student.apply_policy(policy)
        self.student.gradient_checkpointing = loading.gradient_checkpointing
        if loading.freeze_embeddings:
            self.student.freeze_embeddings()
        if self._trainer is None or not self._trainer.strategy.restore_checkpoint_after_setup:
            # An engine, though, must be built over the same parameters in every run: `on_fit_start` freezes then.
            self.student.freeze_unused()
        teacher_reference = reference_to(teacher, loading.teacher or self.model_name)
        teacher_plan = StagePlan.full(teacher_reference, boundary=plan.boundary)
        self.teacher = StagedCausalLM(teacher, teacher_plan, architecture=adapter)
        self.teacher.eval().requires_grad_(False)
        self._check_data()

    def _check_data(self) -> None:
        """Refuse a data module whose tokenizer or lengths do not fit the model."""
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if isinstance(data, PromptResponseDataModule):
            config = self.student.model.config
            check_vocabulary(max(data.tokenizer.get_vocab().values()) + 1, config.vocab_size)
            check_context(data.lengths.max_length, usable_context(config.to_dict()))

    def _untie(self, blocks: Mapping[Stage, Sequence[int]]) -> None:
        """Give blocks weights of their own in a stage, from whole weights where they are sharded."""
        for stage, indices in blocks.items():
            for index in indices:
                if index in self.student.gates:
                    gate = self.student.gates[index]
                    with self._gathered(gate.block.parameters()):
                        gate.untie(stage)

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        return nullcontext() if self._trainer is None else gathered(self._trainer.strategy, parameters)

    @override
    def train(self, mode: bool = True) -> PDTrimModule:
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()
        return self

    # Training

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Also blocks that are frozen now: a resumed run then finds the same parameter groups as the one it continues.
        later = self._weights_of(self._added)
        known = {id(parameter) for parameter in later}
        first = [parameter for parameter in self.student.parameters() if id(parameter) not in known]
        optimizer = self.optimizer_of(first + later)
        if self.lr_scheduler_of is None:
            return optimizer
        scheduler = self.lr_scheduler_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        values = distillation_loss(self.losses, self.distilled(batch), chunk_tokens=self.chunk_tokens)
        loss = weighted_sum(self.losses, values)
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, batch_size=len(batch[0]))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        self._unrecorded = (self.global_step + 1, loss.detach())
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._record_loss()

    def _record_loss(self) -> None:
        """Callbacks save before our `on_train_batch_end`, so a save records the step's loss itself."""
        if self._unrecorded is not None:
            step, loss = self._unrecorded
            self.record.add_loss(step, float(self.trainer.strategy.reduce(loss, reduce_op="mean")))
            self._unrecorded = None

    def distilled(self, batch: Batch) -> Distilled:
        """Run student and teacher on one batch and gather what losses look at."""
        batch = self._in_step(batch)
        watched = any(term.watches_blocks for term in self.losses)
        ours, theirs = BlockOutputs(), BlockOutputs()
        with torch.no_grad():
            teacher = run_observed(self.teacher, batch, theirs if watched else None)
        student = run_observed(self.student, batch, ours if watched else None)
        mask = batch.response_mask
        request = Request.of(*batch.request, self.plan.boundary)
        return Distilled(
            student=student.hidden[mask],
            teacher=teacher.hidden[mask],
            targets=batch.response_ids[mask],
            weights=token_weights(mask),
            student_head=self.student.logits,
            teacher_head=self.teacher.logits,
            student_cache=student.cache,
            teacher_cache=teacher.cache.retained(self.policy),
            student_blocks=ours.outputs,
            teacher_blocks=theirs.outputs,
            token_masks=request.valid,
            min_chunks=self._min_chunks(batch),
        )

    @property
    def _shards(self) -> bool:
        return self._trainer is not None and shards_weights(self._trainer.strategy)

    def _in_step(self, batch: Batch) -> Batch:
        """Where ranks gather weights together, none may skip the decode pass."""
        return batch.with_decode() if self._shards else batch

    def _min_chunks(self, batch: Batch) -> int:
        """How often every rank must call the heads."""
        if not self._shards:
            return 0
        return largest(self.trainer.strategy, ceil(int(batch.response_mask.sum()) / self.chunk_tokens), self.device)

    # Evaluation

    @override
    def on_validation_epoch_start(self) -> None:
        self._means = self._fresh_means()

    @override
    def on_test_epoch_start(self) -> None:
        self._means = self._fresh_means()

    def _fresh_means(self) -> dict[str, MeanMetric]:
        # Not submodules, for `precision: bf16-true` would cast their sums.
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        names = ("nll", "teacher_nll", "kl", "agreement")
        means = {name: MeanMetric() for name in names}
        for mean in means.values():
            mean.set_dtype(exact).to(self.device)
        return means

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._log_quality("val")
        if not self.trainer.sanity_checking:
            self.record.validations.append((self.global_step, values))

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_quality("test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Greedy responses, [B, at most R]; a row that has ended repeats its stop token."""
        return self.student.generate(
            batch.prompt_ids, batch.prompt_mask, max_new_tokens=batch.response_ids.shape[1],
            stop_ids=self._stop_ids(),
        )  # fmt: skip

    def _stop_ids(self) -> tuple[int, ...]:
        """The model's, and the tokenizer's where it is known: a model may not know the end of a chat's turn."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = data.tokenizer if isinstance(data, PromptResponseDataModule) else None
        return stop_ids_of(self.student.model, tokenizer)

    def _measure(self, batch: Batch) -> None:
        batch = self._in_step(batch)
        targets = batch.response_ids[batch.response_mask]
        scores = score_tokens(
            final_hidden(self.student, batch), teacher_states(self.teacher, batch), targets,
            self.student.logits, self.teacher.logits, self.chunk_tokens, self._min_chunks(batch),
        )  # fmt: skip
        for name, column in vars(scores).items():
            self._means[name].update(column)

    def _log_quality(self, prefix: str) -> dict[str, float]:
        means = {name: float(metric.compute()) for name, metric in self._means.items()}
        values = {
            "ppl": float(torch.tensor(means["nll"]).exp()),
            "teacher_ppl": float(torch.tensor(means["teacher_nll"]).exp()),
            "kl": means["kl"],
            "agreement": means["agreement"],
        }
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        return values

    # Checkpoints

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The student's weights; the teacher is never saved."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        return {name: value for name, value in state.items() if not name.startswith(f"{prefix}teacher.")}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._record_loss()
        processes, untied, added = self.trainer.world_size, self.student.untied, tuple(self._added)
        state = CheckpointState(
            self.plan, self.policy, self.record, self.run_config, processes, untied, added, self.run_name,
            self.global_step,
        )  # fmt: skip
        checkpoint[CheckpointState.KEY] = state.to_json()
        checkpoint[RANDOM_STATES] = random_states(self.device)
        checkpoint["loops"] = resumable_loops(checkpoint["loops"], self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = CheckpointState.of(checkpoint)
        state.check_model(self.plan.model)
        if not self.trainer.strategy.restore_checkpoint_after_setup:  # under an engine none comes after the start
            self._untie(state.untied)
        self.student.apply_plan(replace(state.plan, model=self.plan.model))  # it may have moved since
        self.student.apply_policy(state.policy)
        self.student.freeze_unused()
        self.record = state.record
        self._added = list(state.added)
        self.run_name = state.run or self.run_name
        if "state_dict" in checkpoint:  # an engine has loaded its shards itself, and checked them
            check_weights(checkpoint["state_dict"], self.state_dict())
        if self.trainer.state.fn == TrainerFn.FITTING:
            state.check_processes(self.trainer.world_size)
            self._random = checkpoint[RANDOM_STATES][self.global_rank]

    @override
    def on_fit_start(self) -> None:
        self.student.freeze_unused()
        for folder in self._checkpoint_folders():
            check_writable(folder)

    def _checkpoint_folders(self) -> list[str]:
        """Where this process writes checkpoints, on file systems of its own."""
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        folders = [str(saver.dirpath) for saver in savers if saver.dirpath]
        return [folder for folder in folders if "://" not in folder and self.trainer.is_global_zero]

    @override
    def on_train_start(self) -> None:
        for folder in self._checkpoint_folders():  # now that every process has read the checkpoint it continues
            settle(folder)
        if self._random is not None:
            restore_random_state(self._random, self.device)

    @override
    def on_fit_end(self) -> None:
        for folder in self._checkpoint_folders():  # a run that was continued after its last step trains no more
            settle(folder)

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # In the middle of an epoch, once more: a loader draws from a generator when its iteration starts.
        if self._random is not None and batch_idx > 0:
            restore_random_state(self._random, self.device)
        self._random = None


@contextmanager
def evaluating(module: PDTrimModule) -> Iterator[tuple[StagedCausalLM, StagedCausalLM]]:
    """Student and teacher in eval mode, without gradients, at the trainer's precision; the mode is restored."""
    with eval_mode(module.student), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        yield module.student, module.teacher


def _check_same_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"`loading.teacher` has a vocabulary of {teacher} tokens and `model` one of {student}: their distributions "
            "cannot be compared. Use a teacher of the same family, or leave `loading.teacher` out."
        )
