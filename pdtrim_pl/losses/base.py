"""The base classes of distillation losses, and their input.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Stage
from pdtrim_pl.staged import KVCache

Head = Callable[[Tensor], Tensor]
"""A function from final hidden states [n, H] to logits [n, V]."""


Computed = tuple[Tensor, Tensor]
AtHeads = Callable[["Distilled", Callable[["Distilled"], Computed]], Computed]


@dataclass(frozen=True)
class Distilled:
    """Results of student and teacher on one batch: the input of every loss."""

    student: Tensor
    """Final hidden states of the student that predict the response tokens, [N, H]."""
    teacher: Tensor
    """Final hidden states of the teacher, [N, H]."""
    targets: Tensor
    """Response token ids, [N]."""
    weights: Tensor
    """Weight of each token in the mean over the batch, [N]; the sum is 1 where all responses count the same."""
    student_head: Head
    teacher_head: Head
    student_cache: KVCache
    """The cache of the prompt as the student sent it; it has no blocks if no loss `reads_caches`."""
    teacher_cache: KVCache
    """The cache of the teacher with the same entries."""
    student_blocks: Mapping[Stage, Mapping[int, Tensor]]
    """Per stage: original index -> output of the student's block, [B, T, H]; empty if no loss needs them."""
    teacher_blocks: Mapping[Stage, Mapping[int, Tensor]]
    """The same of the teacher."""
    token_masks: Mapping[Stage, Tensor]
    """True for real tokens of each stage, [B, T]."""
    min_chunks: int = 0
    """Minimum number of calls of the heads. With sharded heads all ranks must make the same number. 0 if weights are
    whole."""
    student_head_weights: tuple[nn.Parameter, ...] = ()
    """The parameters that `student_head` uses."""
    at_heads: AtHeads | None = None
    """Calls a loss with this batch while the weights of both heads are whole; None if they always are, or if every call
    of a head gathers them."""


class LossTerm(ABC):
    """One weighted part of the training loss.

    Args:
        weight: factor of this loss in the sum.

    Raises:
        UserError: the weight is not positive.
    """

    name: str
    """Name of the loss. It is logged as `train/<name>`."""

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0:
            raise UserError(f"`weight` of the loss {self.name} is {weight}: give a positive number or drop the loss.")
        self.weight = weight

    @property
    def reads_teacher(self) -> bool:
        """Whether this loss needs anything of the teacher."""
        return True

    @property
    def watches_blocks(self) -> bool:
        """Whether this loss needs the outputs of blocks."""
        return False

    @property
    def reads_caches(self) -> bool:
        """Whether this loss needs the caches of the prompt."""
        return False


class TokenLoss(LossTerm):
    """A loss on the logits of each token. A subclass implements `per_token`."""

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Losses [n] from fp32 logits of student and teacher, [n, V] each, and target ids [n]."""

    def with_gradient(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [n], and their gradients with respect to the student's logits, [n, V].

        Arguments as of `per_token`, without gradients. A subclass may compute both in fewer passes over the logits.
        """
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            losses = self.per_token(student, teacher, targets)
            (gradient,) = torch.autograd.grad(losses.sum(), student)
        return losses.detach(), gradient


class StateLoss(LossTerm):
    """A loss on hidden states or caches. A subclass implements `of`."""

    @property
    def reads_caches(self) -> bool:
        return True

    @abstractmethod
    def of(self, batch: Distilled) -> Tensor:
        """The loss of the whole batch, a scalar."""
