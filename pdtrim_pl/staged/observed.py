"""A pass over one batch that keeps the outputs of blocks, for losses that need them.

Shapes: B batch, T tokens of a stage, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged import StagedCausalLM, StagedOutput
from pdtrim_pl.staged.below import Below
from pdtrim_pl.staged.gate import Observer
from pdtrim_pl.staged.rows import RowCounts


class BlockOutputs:
    """Collects the outputs of blocks, [B, T, H] each, by stage and original index."""

    def __init__(self) -> None:
        self.outputs: dict[Stage, dict[int, Tensor]] = {stage: {} for stage in STAGES}

    def of(self, stage: Stage) -> Observer:
        """The observer that collects the outputs of one stage."""
        outputs = self.outputs[stage]

        def observe(block: int, _: Tensor, out: Tensor) -> None:
            outputs[block] = out

        return observe


def run_observed(
    model: StagedCausalLM, batch: Batch, watch: BlockOutputs | None, *, keep_cache: bool = True,
    counts: RowCounts | None = None, below: Below | None = None,
) -> StagedOutput:  # fmt: skip
    """Run the teacher-forced pass over a batch under the model's plan and policy, and fill `watch` if it is given.

    See `StagedCausalLM.forward` for `keep_cache`, `counts` and `below`.
    """
    observers = {stage: watch.of(stage) for stage in STAGES} if watch is not None else None
    out: StagedOutput = model(*batch.request, observers=observers, keep_cache=keep_cache, counts=counts, below=below)
    return out
