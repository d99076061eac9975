"""The part of the module that knows where its teacher lives."""

from __future__ import annotations

import logging
from abc import abstractmethod

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from typing_extensions import override

from pdtrim_pl.data import Batch, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.measured import MeasuredModule
from pdtrim_pl.losses import LossTerm
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.eight_bits import check_eight_bits
from pdtrim_pl.models.liger import check_liger, use_liger
from pdtrim_pl.models.loading import Loading, check_attention
from pdtrim_pl.models.placement import Placement, TeacherPlace
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.sizing.callback_load import check_callbacks
from pdtrim_pl.sizing.of_run import Processes, room_on_device, size_of
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.below import common_blocks
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.staged.rows import RowCounts
from pdtrim_pl.staged.shared import SharedTeacher
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.strategies import Sharding, check_compiling, check_teacher_bits
from pdtrim_pl.teacher.choice import Allowed, Choice, choose
from pdtrim_pl.teacher.offline import OfflineTeacher

log = logging.getLogger(__name__)


class PlacedModule(MeasuredModule):
    """Chooses the teacher's place, and refuses what cannot be done with it. A subclass has the settings.

    Args:
        place: where the teacher is to live.
        trainable: what trains.
    """

    teacher: StagedCausalLM
    model_name: str
    loading: Loading
    losses: list[LossTerm]
    optimizer_of: OptimizerCallable
    architecture: Architecture | None

    def __init__(self, place: TeacherPlace, trainable: Trainable | LoRA) -> None:
        super().__init__()
        self.place = place
        self.trainable: Trainable | LoRA = LoRA() if trainable == "lora" else trainable
        self.offline: OfflineTeacher | None = None
        """The teacher on disk, while a run with `teacher.placement: offline` trains."""
        self._choice: Choice | None = None
        self._counts: RowCounts | None = None
        """Numbers of tokens of the next training batch."""
        self._compared: tuple[StagePlan, KVRetentionPolicy | None, int] | None = None

    @property
    @abstractmethod
    def pair(self) -> ModelPair:
        """Settings of the models that are loaded."""

    @property
    def placement(self) -> Placement:
        """Where the teacher lives; never `auto`.

        Raises:
            UserError: the place that was asked for is not possible.
        """
        if self._choice is None:
            self._choice = self.parallel.agree(self._chosen())
            if self.place.placement == "auto" and self._trainer is not None:
                log.info("Place of the teacher: %s (%s).", self._choice.placement, self._choice.why)
        return self._choice.placement

    @property
    @override
    def is_alone(self) -> bool:
        return self.placement == "offline"

    @property
    def allowed(self) -> Allowed:
        """What the settings say of the teacher's place."""
        shards = self._trainer is not None and Sharding.of(self._trainer.strategy).zero_stage == 3
        same = self.pair.teacher_name == self.model_name
        return Allowed(isinstance(self.trainable, LoRA), same, shards, self.loading.teacher_bits is not None)

    def _check_teacher_bits(self) -> None:
        """Refuse a teacher in 8 bits where it cannot be loaded, before data is tokenised."""
        if self.loading.teacher_bits is not None and not self.is_alone:
            check_teacher_bits(self.trainer.strategy, self.loading.teacher_bits)
            check_eight_bits(self.trainer.strategy.root_device)

    def _check_callbacks(self) -> None:
        """Refuse callbacks that cannot work with this place and with what trains."""
        callbacks = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        check_callbacks(callbacks, offline=self.is_alone, adapters=isinstance(self.trainable, LoRA))

    @override
    def _unused_weights(self) -> list[nn.Parameter]:
        unused = super()._unused_weights()
        if self.placement != "shared":
            return unused
        adapters = {id(p) for gate in self.student.gates.values() for p in gate.adapters.parameters()}
        return [parameter for parameter in unused if id(parameter) in adapters]  # the teacher runs every block

    def _loaded_teacher(self, student: StagedCausalLM) -> StagedCausalLM | None:
        """The teacher at its place, and the student's side of the comparison; None if it is offline.

        Blocks of both models are compiled, if they are to be.
        """
        if self.loading.compile:
            student.compile_blocks()
        placement, boundary = self.placement, student.plan.boundary
        if placement == "offline":
            student.compared_tokens = self.pair.compared_tokens()
            return None
        if placement == "shared":
            return SharedTeacher(student)
        device = None if self._trainer is None else self._trainer.strategy.root_device
        teacher = self.pair.teacher(boundary, student.model.config.vocab_size, device)
        student.compared_tokens = teacher.compared_tokens
        if self.loading.liger:
            use_liger(teacher.model)
        if self.loading.compile:
            teacher.compile_blocks()
        return teacher

    def _data(self) -> PromptResponseDataModule | None:
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        return data if isinstance(data, PromptResponseDataModule) else None

    def _open_cache(self) -> None:
        """Read the teacher's cache, whose rows take the teacher's place in training."""
        data = self._data()
        if data is None:
            raise UserError(
                "`teacher.placement: offline` finds the teacher's distributions by the examples of a "
                "PromptResponseDataModule, and this run has none. Use one, or `teacher.placement: copy`."
            )
        assert self.place.cache is not None, "`TeacherPlace` refuses this"
        offline = OfflineTeacher(self.place.cache, self.pair, data, self.losses)
        self.offline = offline

    def _check_kernels(self) -> None:
        """Refuse attention implementations, compiled blocks and other kernels that cannot run here."""
        strategy, precision = self.trainer.strategy, str(self.trainer.precision)
        halves = precision.startswith(("bf16", "16")) or self.loading.dtype in ("bfloat16", "float16")
        check_attention(self.loading.attn_implementation, strategy.root_device.type, sixteen_bits=halves)
        if self.loading.compile:
            check_compiling(strategy, self.trainable)
        if self.loading.liger:
            check_liger(strategy.root_device)

    def _common(self) -> int:
        """Number of first blocks that the teacher runs for the student too. Computed anew after a change of plan."""
        if self.trainable != "merged" or not self.parallel.whole:
            return 0  # elsewhere the first block trains
        if self._compared is None or self._compared[0] is not self.plan or self._compared[1] is not self.policy:
            self._compared = (self.plan, self.policy, common_blocks(self.student, self.teacher))
        return self._compared[2]

    def _watch_batches(self) -> None:
        """Look at every training batch while it is in host memory."""
        data = self._data()
        if data is not None:
            data.on_batch = lambda batch: self._on_batch(batch) if self.trainer.training else None

    def _on_batch(self, batch: Batch) -> None:
        self._counts = RowCounts.of(batch.prompt_mask, batch.response_mask)
        if self.offline is not None:
            self.offline.fetch(batch)

    def _chosen(self) -> Choice:
        places, data = self.allowed.places(self.place), self._data()
        if len(places) == 1:
            return choose(places, lambda _: 0, 0)
        if data is None or self._trainer is None:
            return Choice(places[0], "memory is not estimated without a PromptResponseDataModule")
        trainer = self._trainer
        on_cpu = trainer.strategy.root_device.type == "cpu"
        processes = Processes(trainer.strategy, str(trainer.precision), trainer.world_size, on_cpu)
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        size = size_of(self, data, callbacks, processes)
        room = room_on_device(trainer.strategy.root_device.type, trainer.world_size // trainer.num_nodes)
        return choose(places, lambda place: size.memory(place).total, room)
