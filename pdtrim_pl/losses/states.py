"""Losses on hidden states, and on the keys and values that prefill sends.

Shapes: B batch, T tokens of a stage, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.base import Distilled, StateLoss
from pdtrim_pl.plan import STAGES


class HiddenMatch(StateLoss):
    """Distance between the student's and the teacher's output of the same original block, over the tokens of a stage.

    The loss is the mean over blocks and stages.

    Args:
        weight: factor of this loss in the sum.
        metric: `mse`, relative to the teacher's mean square, or `cosine` (1 - cosine similarity).
        blocks: original indices of the blocks to compare; by default every block that the student runs.

    Raises:
        UserError: no stage runs any of `blocks`. Raised in the first training step.
    """

    name = "hidden"

    def __init__(
        self, weight: float = 1.0, metric: Literal["mse", "cosine"] = "mse", blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__(weight)
        self.metric = metric
        self.blocks = None if blocks is None else frozenset(blocks)

    @property
    def watches_blocks(self) -> bool:
        return True

    @property
    def reads_caches(self) -> bool:
        return False

    def of(self, batch: Distilled) -> Tensor:
        terms: list[tuple[Tensor, Tensor]] = []
        seen = {block for stage in STAGES for block in batch.student_blocks[stage]}
        if self.blocks is not None and not self.blocks & seen:
            raise UserError(
                f"`blocks` of the loss hidden is {sorted(self.blocks)}, and no stage runs any of them. Blocks that are "
                f"run: {sorted(seen)}."
            )
        for stage in STAGES:
            mask = batch.token_masks[stage]
            for block, out in batch.student_blocks[stage].items():
                if self.blocks is None or block in self.blocks:
                    distance = self._distance(out, batch.teacher_blocks[stage][block], mask)
                    terms.append((distance, mask.any()))
        return _mean(terms) if terms else batch.student.sum() * 0.0

    def _distance(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        if self.metric == "cosine":
            similarity = F.cosine_similarity(*_masked(student, teacher, mask), dim=-1)
            return 1.0 - (similarity * mask).sum() / mask.sum().clamp(min=1)
        return _relative_mse(student, teacher, mask)


class KVMatch(StateLoss):
    """Distance between the keys and values that the student sends and those of the teacher, for every block of D.

    The distance is the squared difference relative to the teacher's mean square. The loss is the mean over blocks, and
    over keys and values.
    """

    name = "kv"

    def of(self, batch: Distilled) -> Tensor:
        terms: list[tuple[Tensor, Tensor]] = []
        for index, sent in batch.student_cache.blocks.items():
            full, mask = batch.teacher_cache.blocks[index], sent.slots.valid
            for ours, theirs in ((sent.keys, full.keys), (sent.values, full.values)):
                distance = _relative_mse(ours.transpose(1, 2).flatten(2), theirs.transpose(1, 2).flatten(2), mask)
                terms.append((distance, mask.any()))
        return _mean(terms) if terms else batch.student.sum() * 0.0


def _relative_mse(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Squared difference at the real tokens, relative to the square of `theirs`; both [B, T, H], the mask [B, T]."""
    ours, theirs = _masked(ours, theirs, mask)
    numbers = (mask.sum() * ours.shape[-1]).clamp(min=1)
    return (ours - theirs).square().sum() / numbers / (theirs.square().sum() / numbers).clamp(min=1e-12)


def _masked(ours: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32, with zeros at padding. Nothing has to wait for the number of real tokens."""
    return tuple(part.float().masked_fill(~mask[..., None], 0.0) for part in (ours, theirs))  # type: ignore[return-value]


def _mean(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of distances, leaving out those of a stage or a cache without real tokens: (distance, whether it counts)."""
    distances, counts = (torch.stack(part) for part in zip(*terms, strict=True))
    return distances.where(counts, 0.0).sum() / counts.sum().clamp(min=1)
