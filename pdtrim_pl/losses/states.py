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
        terms = []
        seen = {block for stage in STAGES for block in batch.student_blocks[stage]}
        if self.blocks is not None and not self.blocks & seen:
            raise UserError(
                f"`blocks` of the loss hidden is {sorted(self.blocks)}, and no stage runs any of them. Blocks that are "
                f"run: {sorted(seen)}."
            )
        for stage in STAGES:
            mask = batch.token_masks[stage]
            for block, out in batch.student_blocks[stage].items():
                if mask.any() and (self.blocks is None or block in self.blocks):
                    terms.append(self._distance(out[mask].float(), batch.teacher_blocks[stage][block][mask].float()))
        return torch.stack(terms).mean() if terms else batch.student.sum() * 0.0

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.metric == "cosine":
            return 1.0 - F.cosine_similarity(student, teacher, dim=-1).mean()
        return _relative_mse(student, teacher)


class KVMatch(StateLoss):
    """Distance between the keys and values that the student sends and those of the teacher, for every block of D.

    The distance is the squared difference relative to the teacher's mean square. The loss is the mean over blocks, and
    over keys and values.
    """

    name = "kv"

    def of(self, batch: Distilled) -> Tensor:
        terms = []
        for index, sent in batch.student_cache.blocks.items():
            full, mask = batch.teacher_cache.blocks[index], sent.slots.valid
            if not mask.any():
                continue
            for ours, theirs in ((sent.keys, full.keys), (sent.values, full.values)):
                terms.append(_relative_mse(ours.transpose(1, 2)[mask].float(), theirs.transpose(1, 2)[mask].float()))
        return torch.stack(terms).mean() if terms else batch.student.sum() * 0.0


def _relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)
