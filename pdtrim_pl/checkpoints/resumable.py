"""The base class of the module: it saves and continues runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import settle
from pdtrim_pl.checkpoints.loop_state import resumable_loops
from pdtrim_pl.checkpoints.random_state import RandomState, random_states, restore_random_state
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.checkpoints.state import CheckpointState, check_weights, check_writable
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import KVRetentionPolicy, Stage, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.refit import Refit

RANDOM_STATES = "pdtrim_random"
"""Key of the random generators of all processes in a checkpoint."""
MOST_UNREAD = 1000
"""Losses that stay on the device, if the trainer logs none."""


class ResumableModule(LightningModule):
    """Saves plan, policy, record and random generators of a run in its checkpoints. A subclass builds the student."""

    student: StagedCausalLM

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # the teacher is never in a checkpoint; `check_weights` is strict about the rest
        self.record = RunRecord()
        self.run_config = ""
        self.found_checkpoint: str | Path | None = None
        """What this process found for `--ckpt_path last`. The processes compare it before they load anything."""
        self.run_name = ""
        """Random name of the run. A continued run takes the name in its checkpoint."""
        self._unrecorded: list[tuple[int, Tensor]] = []
        self.read_loss: Tensor | None = None
        """The last training loss that was read from the device, for progress bars, in host memory."""
        self._random: RandomState | None = None
        self._added: list[tuple[Stage, int]] = []
        """(stage, block) pairs that got weights of their own after the optimizer was created, in that order."""

    @property
    @abstractmethod
    def parallel(self) -> Parallel:
        """The communication between the processes of the run."""

    # Structure

    @property
    def plan(self) -> StagePlan:
        """The student's stage plan."""
        return self.student.plan

    @property
    def policy(self) -> KVRetentionPolicy | None:
        """The student's KV retention policy; None sends everything."""
        return self.student.policy

    def apply_plan(self, plan: StagePlan, refits: Iterable[Refit] = ()) -> None:
        """Train under `plan` from now on, and add its new removals to the run's record.

        Weights that were offered for merges of `plan`, and those of `refits`, are written into the student, and their
        optimizer state is reset. New weights join a parameter group of the optimizer: their block's, or the first one.
        """
        known, before, parallel = len(self.plan.history), self._own_weights(), self.parallel
        written: list[nn.Parameter] = []

        def write(parameter: nn.Parameter, value: Tensor) -> None:
            parallel.write_weight(parameter, value)
            written.append(parameter)

        self.student.apply_plan(plan, write, refits)
        self.student.freeze_unused()
        parallel.forget_gradients()
        added = [key for key in self._own_weights() if key not in before]
        self._added += added
        parallel.renew_optimizer(written, [(key[1], weight) for key in added for weight in self._weights_of([key])])
        parallel.release(self._unused_weights())
        self.record.removals += [(self.global_step, removal) for removal in plan.history[known:]]

    def apply_policy(self, policy: KVRetentionPolicy | None) -> None:
        """Train under `policy` from now on."""
        self.student.apply_policy(policy)

    def optimized_parameters(self) -> list[nn.Parameter]:
        """The parameters for a new optimizer, in the order that its states in a checkpoint have.

        Frozen parameters are included, so that a resumed run has the same parameter groups as the run it continues.
        """
        added = self._weights_of(self._added)
        known = {id(parameter) for parameter in added}
        return [*(parameter for parameter in self.student.parameters() if id(parameter) not in known), *added]

    def _own_weights(self) -> list[tuple[Stage, int]]:
        """(stage, block) pairs of weights that belong to one stage."""
        return [(stage, index) for stage, blocks in self.student.untied.items() for index in blocks]

    def _weights_of(self, own: Iterable[tuple[Stage, int]]) -> list[nn.Parameter]:
        gates = self.student.gates
        return [parameter for stage, index in own for parameter in gates[index].untied[stage].parameters()]

    def _unused_weights(self) -> list[nn.Parameter]:
        """Weights that no pass needs any more: those of blocks that have left both stages."""
        used = {*self.plan.prefill, *self.plan.decode}
        left = [gate for index, gate in self.student.gates.items() if index not in used]
        return [parameter for gate in left for parameter in gate.parameters()]

    def _untie(self, blocks: Mapping[Stage, Sequence[int]]) -> None:
        """Give blocks weights of their own in a stage. Sharded weights are gathered first."""
        for stage, indices in blocks.items():
            for index in indices:
                if index in self.student.gates:
                    gate = self.student.gates[index]
                    with self.parallel.whole_weights(gate.block.parameters()):
                        gate.untie(stage)

    # Losses in the record

    def note_loss(self, loss: Tensor) -> None:
        """Remember the loss of the current step for the record."""
        self._unrecorded.append((self.global_step + 1, loss))

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self._unrecorded) >= (every or MOST_UNREAD):
            self.record_losses()

    @override
    def on_train_epoch_end(self) -> None:
        self.record_losses()

    def record_losses(self) -> None:
        """Write the losses since the last call into the record. Collective, and waits for the device.

        It is called every `log_every_n_steps` batches, at the end of an epoch and before a save.
        """
        if not self._unrecorded:
            return
        steps, losses = zip(*self._unrecorded, strict=True)
        self._unrecorded = []
        means = self.trainer.strategy.reduce(torch.stack(losses), reduce_op="mean").cpu()
        for step, loss in zip(steps, means.tolist(), strict=True):
            self.record.add_loss(step, loss)
        self.read_loss = means[-1]

    # Checkpoints

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of the student. The teacher is never saved."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        return {name: value for name, value in state.items() if not name.startswith(f"{prefix}teacher.")}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.record_losses()
        processes, untied, added = self.trainer.world_size, self.student.untied, tuple(self._added)
        state = CheckpointState(
            self.plan, self.policy, self.record, self.run_config, processes, untied, added, self.run_name,
            self.global_step, self.student.lora,
        )  # fmt: skip
        checkpoint[CheckpointState.KEY] = state.to_json()
        checkpoint[RANDOM_STATES] = random_states(self.device)
        checkpoint["loops"] = resumable_loops(checkpoint["loops"], self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = CheckpointState.of(checkpoint)
        state.check_model(self.plan.model)
        state.check_adapters(self.student.lora)
        if not self.trainer.strategy.restore_checkpoint_after_setup:  # DeepSpeed cannot add weights after its setup
            self._untie(state.untied)
        self.student.apply_plan(replace(state.plan, model=self.plan.model))  # the path of the model may have changed
        self.student.apply_policy(state.policy)
        self.student.freeze_unused()
        self.record = state.record
        self._added = list(state.added)
        self.run_name = state.run or self.run_name
        if "state_dict" in checkpoint:  # absent under DeepSpeed, which loads and checks its shards itself
            check_weights(checkpoint["state_dict"], self.state_dict())
        if self.trainer.state.fn == TrainerFn.FITTING:
            state.check_processes(self.trainer.world_size)
            self._random = checkpoint[RANDOM_STATES][self.global_rank]

    @override
    def on_fit_start(self) -> None:
        self.student.freeze_unused()
        self.parallel.release(self._unused_weights())
        for folder in self._checkpoint_folders():
            check_writable(folder)

    def _checkpoint_folders(self) -> list[str]:
        """Local folders in which this process writes checkpoints; empty on all ranks but 0."""
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        folders = [str(saver.dirpath) for saver in savers if saver.dirpath]
        return [folder for folder in folders if "://" not in folder and self.trainer.is_global_zero]

    @override
    def on_train_start(self) -> None:
        for folder in self._checkpoint_folders():  # all processes have read their checkpoint by now
            settle(folder)
        if self._random is not None:
            restore_random_state(self._random, self.device)

    @override
    def on_fit_end(self) -> None:
        for folder in self._checkpoint_folders():  # `on_train_start` is not called if no step was left
            settle(folder)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Restore again in the middle of an epoch: a loader uses a generator when its iteration starts.
        if self._random is not None and batch_idx > 0:
            restore_random_state(self._random, self.device)
        self._random = None
