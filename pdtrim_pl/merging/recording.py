"""Record hidden states of the teacher between blocks, for the local fits of many runs.

Shapes: B batch, T tokens of a stage, H hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.plan import STAGES, Boundary, Stage
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.gate import Observer


@dataclass(frozen=True, eq=False)
class Recording:
    """Hidden states of the teacher on one batch."""

    request: Request
    hidden: Mapping[Stage, Mapping[int, Tensor]]
    """Per stage: block index -> the hidden state that reaches this block, [B, T, H], in the teacher's element type. The
    index `num_blocks` stands for the output of the last block."""

    def tokens(self, stage: Stage) -> int:
        """Number of real tokens of a stage."""
        return int(self.request.valid[stage].sum())


@torch.no_grad()
def record(teacher: StagedCausalLM, batch: Batch, boundary: Boundary, places: Collection[int]) -> Recording:
    """Run the teacher once and keep its hidden states at `places`.

    Args:
        teacher: the teacher, under its full plan.
        batch: a batch on the teacher's device.
        boundary: boundary of the student's plan. The teacher's plan must have the same.
        places: indices of blocks whose input is kept; `num_blocks` stands for the output of the last block.
    """
    assert teacher.plan.boundary == boundary
    hidden: dict[Stage, dict[int, Tensor]] = {stage: {} for stage in STAGES}

    def keeping(stage: Stage) -> Observer:
        def observe(block: int, before: Tensor, after: Tensor) -> None:
            if block in places:
                hidden[stage][block] = before
            if block + 1 in places:
                hidden[stage][block + 1] = after

        return observe

    teacher(*batch.request, observers={stage: keeping(stage) for stage in STAGES})
    return Recording(Request.of(*batch.request, boundary), hidden)
