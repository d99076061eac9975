"""Questions that all ranks answer alike at an optimizer step, in one all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from pdtrim_pl import compat

Question = Callable[[], Tensor | bool]
"""What this rank says. A tensor stays on its device until all questions are answered."""


class StepFlags:
    """The questions of a run. A callback asks its own, and reads all answers before the optimizer steps."""

    def __init__(self) -> None:
        self._questions: dict[str, Question] = {}
        self._step = -1
        self._answers: Mapping[str, bool] = {}

    def ask(self, name: str, question: Question) -> None:
        """Ask a question at every optimizer step from now on. All ranks must ask the same."""
        self._questions[name] = question
        self._step = -1

    def at_step(self, trainer: Trainer) -> Mapping[str, bool] | None:
        """The answers before the optimizer steps; None if it does not step after this batch.

        DeepSpeed accumulates by itself, and there Lightning calls `on_before_optimizer_step` for every batch.
        """
        if not compat.optimizer_step_is_due(trainer):
            return None
        return self.answers(trainer.strategy, trainer.global_step)

    def answers(self, strategy: Strategy, step: int) -> Mapping[str, bool]:
        """For each question, whether any rank says yes. Every rank must call it.

        The first call in a step is a collective and waits for the device. Further calls return the same.

        Args:
            strategy: strategy of the trainer.
            step: number of the optimizer step that is due.
        """
        if step != self._step:
            self._step = step
            said = [question() for question in self._questions.values()]
            self._answers = dict(zip(self._questions, _agreed(said, strategy), strict=True))
        return self._answers


def _agreed(said: list[Tensor | bool], strategy: Strategy) -> list[bool]:
    if not dist.is_initialized() and not any(isinstance(each, Tensor) for each in said):
        return [bool(each) for each in said]  # nothing to wait for
    device = strategy.root_device
    numbers = [each if isinstance(each, Tensor) else torch.full((), each, device=device) for each in said]
    agreed = strategy.reduce(torch.stack([each.int() for each in numbers]), reduce_op="max")
    assert isinstance(agreed, Tensor)
    return [bool(each) for each in agreed.tolist()]
