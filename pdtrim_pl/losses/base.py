"""What a distillation loss looks at, and the two kinds of losses.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Stage
from pdtrim_pl.staged import KVCache

Head = Callable[[Tensor], Tensor]
"""From final hidden states [n, H] to logits [n, V]."""


@dataclass(frozen=True)
class Distilled:
    """Student and teacher on one batch: all that a loss may look at."""

    student: Tensor
    """Final hidden states of the student that predict the response tokens, [N, H]."""
    teacher: Tensor
    targets: Tensor
    """Response token ids, [N]."""
    weights: Tensor
    """Each token's share of the batch's mean, [N]; they sum to 1."""
    student_head: Head
    teacher_head: Head
    student_cache: KVCache
    """The prompt's cache as the student sent it."""
    teacher_cache: KVCache
    """The teacher's cache at the same entries."""
    student_blocks: Mapping[Stage, Mapping[int, Tensor]]
    """Outputs of the student's blocks that a loss asked to see, [B, T, H] each."""
    teacher_blocks: Mapping[Stage, Mapping[int, Tensor]]
    token_masks: Mapping[Stage, Tensor]
    """Real tokens of each stage, [B, T]."""
    min_chunks: int = 0
    """Call the heads at least so often: sharded heads are gathered by all ranks together."""


class LossTerm(ABC):
    """One weighted part of the training loss.

    Args:
        weight: its factor in the sum.

    Raises:
        UserError: the weight is not positive.
    """

    name: ClassVar[str]
    """Under this name it is logged, as `train/<name>`."""

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0:
            raise UserError(f"`weight` of the loss {self.name} is {weight}: give a positive number or drop the loss.")
        self.weight = weight

    @property
    def watches_blocks(self) -> bool:
        """Whether the outputs of single blocks must be recorded for this loss."""
        return False


class TokenLoss(LossTerm):
    """A loss on the logits of single tokens. A subclass writes `per_token`."""

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Losses [n] from logits in fp32, [n, V] each, and token ids [n]."""


class StateLoss(LossTerm):
    """A loss on hidden states or caches. A subclass writes `of`."""

    @abstractmethod
    def of(self, batch: Distilled) -> Tensor:
        """The loss of the whole batch, a scalar."""
