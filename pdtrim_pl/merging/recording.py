"""What the teacher's hidden state is between blocks, for the fits of many runs at once.

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
    """One batch under the teacher."""

    request: Request
    hidden: Mapping[Stage, Mapping[int, Tensor]]
    """Per stage, block index -> the hidden state that reaches that block, [B, T, H]; `num_blocks` is behind the last.
    In the teacher's element type."""

    def tokens(self, stage: Stage) -> int:
        """Real tokens of a stage."""
        return int(self.request.valid[stage].sum())


@torch.no_grad()
def record(teacher: StagedCausalLM, batch: Batch, boundary: Boundary, places: Collection[int]) -> Recording:
    """Run the teacher once and keep its hidden states at `places`.

    Args:
        teacher: under its full plan.
        batch: on the teacher's device.
        boundary: which stage handles the prompt's last token.
        places: block indices; `num_blocks` is behind the last block.
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
