"""The student's frozen weights as its teacher."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from pdtrim_pl.plan import StagePlan
from pdtrim_pl.staged.gate import StagePass
from pdtrim_pl.staged.lora import without_adapters
from pdtrim_pl.staged.model import StagedCausalLM


class SharedTeacher(StagedCausalLM):
    """Runs every block of a student in both stages, without its adapters. It has no weights of its own.

    Args:
        student: a student whose adapters train and whose blocks do not.
    """

    def __init__(self, student: StagedCausalLM) -> None:
        nn.Module.__init__(self)  # the blocks have gates already
        self.model, self.architecture, self.originals = student.model, student.architecture, student.originals
        self.plan = StagePlan.full(student.plan.model, boundary=student.plan.boundary)
        self.policy, self.compared_tokens = None, student.compared_tokens
        self.gradient_checkpointing, self.trainable = False, "all"
        self.whole_head = student.whole_head
        self.training = False

    @override
    def train(self, mode: bool = True) -> SharedTeacher:
        """Do nothing: the mode of the modules is the student's."""
        return self

    @override
    def _run(self, token_ids: Tensor, current: StagePass) -> Tensor:
        student_trains = self.model.training
        if student_trains:
            self.model.eval()
        try:
            with without_adapters():
                return super()._run(token_ids, current)
        finally:
            if student_trains:
                self.model.train()
