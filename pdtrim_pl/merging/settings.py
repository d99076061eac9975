"""Settings of merges and of their local fits. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Move, Stage, StagePlan

_HELD_OUT = 64
"""Maximum number of held-out examples. They suffice to compare fits, and more would leave less text to train on."""


@dataclass(frozen=True)
class Merging:
    """Settings of merges: one block, after a local fit, replaces a run of neighbouring blocks."""

    min_cosine: float = 0.95
    """A run may be merged if the fitted block reaches this mean cosine similarity to the run's output (d_T of
    PDTrim)."""
    steps: int = 128
    """Optimizer steps of a fit. Afterwards the last projection of the block is solved by least squares on the same
    text. The solution is kept if it is better on held-out text. Families that do not add the output of this projection
    to the residual stream unchanged skip it (Gemma 2 and 3, OLMo 2, Granite)."""
    batch_size: int = 1
    """Maximum number of examples in a step. Batches of the data are cut, but not joined. On the same text, many small
    steps fit better than few large ones (docs/results)."""
    learning_rate: float = 0.02
    """Peak learning rate of Adam, as a share of the root mean square of a weight tensor, so that one value suits models
    of any width. It rises over a tenth of the steps and falls to zero along a cosine."""
    tied: bool = False
    """Write a merged block into the weights that both stages share. This is possible only if every stage that uses the
    block merges it. By default, a block that is merged in one stage only gets weights of its own there."""
    pairs_at_once: int = 4
    """Number of runs that are fitted at once. Each needs fp32 weights, gradients and Adam moments of two blocks: 32
    bytes per weight of a block."""
    cache_bytes: int = 4 * 2**30
    """Maximum number of bytes of teacher hidden states to keep. If they do not fit, the runs are cut into parts, and
    the teacher runs once for each part."""
    seed: int = 0
    """Seed of the order of batches."""

    def __post_init__(self) -> None:
        if not -1 <= self.min_cosine <= 1:
            raise UserError(f"`min_cosine` is {self.min_cosine}: a cosine is between -1 and 1.")
        if self.steps < 0 or self.learning_rate <= 0:
            raise UserError(f"Merging needs `steps` >= 0 and `learning_rate` > 0, got {self}.")
        if min(self.pairs_at_once, self.batch_size) < 1 or self.cache_bytes < 0:
            raise UserError(f"Merging needs `pairs_at_once` and `batch_size` >= 1 and `cache_bytes` >= 0, got {self}.")

    def held_back(self, batches: int, size: int) -> int:
        """Number of held-out batches, out of `batches` batches of `size` examples.

        A quarter of the batches, but at most 64 examples. One of two or three batches; none of a single batch.
        """
        return min(batches // 4, -(-_HELD_OUT // size)) or min(1, batches - 1)

    def batches(self, size: int) -> int:
        """Number of batches of `size` examples that a fit can use: new text for every step, and held-out text."""
        step = min(size, self.batch_size)
        steps = self.steps + min(-(-self.steps // 3), -(-_HELD_OUT // step))
        return -(-steps // -(-size // step))

    def allows(self, plan: StagePlan, move: Move) -> bool:
        """Whether `plan` allows a merge: its blocks are neighbours and, if `tied`, all stages that use it merge."""
        try:
            merged = move.apply(plan, untied=False)
        except ValueError:
            return False
        return not (self.tied and _left_out(plan, merged, move))

    def apply(self, plan: StagePlan, move: Move, **facts: Any) -> StagePlan:
        """The plan after a merge. The block gets weights of its own only if another stage still uses the old ones.

        Args:
            plan: the plan before the merge.
            move: a merge that `allows` accepts.
            **facts: facts for the history, as in `StagePlan.merge`.
        """
        untied = bool(_left_out(plan, move.apply(plan, untied=False), move))
        assert not (untied and self.tied)
        return move.apply(plan, untied=untied, **facts)


def merging_stages(plan: StagePlan, merged: StagePlan, move: Move) -> dict[Stage, tuple[int, ...]]:
    """Per stage that `move` merges in: the original blocks that the merged block replaces."""
    assert move.into is not None
    runs = {stage: merged.merged[stage].get(move.into, ()) for stage in STAGES}
    return {stage: run for stage, run in runs.items() if run and run != plan.merged[stage].get(move.into)}


def _left_out(plan: StagePlan, merged: StagePlan, move: Move) -> set[Stage]:
    """Stages that use the shared weights of the merged block, but do not merge."""
    users = {stage for stage in STAGES if move.into in merged.blocks(stage)}
    if move.into in merged.kv_only:
        users.add("prefill")
    return {s for s in users - set(merging_stages(plan, merged, move)) if move.into not in merged.untied[s]}
