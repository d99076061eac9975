"""How runs of blocks are fitted and merged. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Move, Stage, StagePlan

_JUDGED = 64
"""Examples that tell well enough which of two fits is better; with more of them, fewer are left to learn from."""


@dataclass(frozen=True)
class Merging:
    """The distillation set: neighbours that one block, after a local fit, can stand for."""

    min_cosine: float = 0.95
    """A run may be merged if the fitted block reaches this mean cosine with the run's output (d_T of PDTrim)."""
    steps: int = 128
    """Optimizer steps of a fit. After them the block's last projection is solved by least squares on the same text, in
    families that add what it gives as it is (not Gemma 2 and 3, OLMo 2, Granite), and kept so if that is better on text
    that was held back."""
    batch_size: int = 1
    """Examples a step sees, at most: batches of the data are cut, not joined. Of the same text, many small steps fit
    better than few large ones (docs/results)."""
    learning_rate: float = 0.02
    """Of Adam, at its highest, as a share of a weight tensor's root mean square, so that it fits models of any width;
    it rises for a tenth of the steps and falls to zero as a cosine."""
    tied: bool = False
    """Write a merged block into the weights that both stages share, which only a merge in every stage that uses it
    allows. Otherwise a block that is merged in one stage alone gets weights of its own there."""
    pairs_at_once: int = 4
    """Runs whose fp32 copies and Adam moments are in memory at a time: twice 16 bytes a weight of a block for each."""
    cache_bytes: int = 4 * 2**30
    """Most bytes of teacher hidden states to keep; with less than all, the teacher runs once for every part of the
    runs."""
    seed: int = 0
    """Of the order of the batches."""

    def __post_init__(self) -> None:
        if not -1 <= self.min_cosine <= 1:
            raise UserError(f"`min_cosine` is {self.min_cosine}: a cosine is between -1 and 1.")
        if self.steps < 0 or self.learning_rate <= 0:
            raise UserError(f"Merging needs `steps` >= 0 and `learning_rate` > 0, got {self}.")
        if min(self.pairs_at_once, self.batch_size) < 1 or self.cache_bytes < 0:
            raise UserError(f"Merging needs `pairs_at_once` and `batch_size` >= 1 and `cache_bytes` >= 0, got {self}.")

    def held_back(self, batches: int, size: int) -> int:
        """Of batches of `size` examples, a step's each, so many are kept to judge on.

        A quarter, but no more than give 64 examples; one of two or three, none of one.
        """
        return min(batches // 4, -(-_JUDGED // size)) or min(1, batches - 1)

    def batches(self, size: int) -> int:
        """So many batches of `size` examples give every step some of its own, beside those that are held back."""
        step = min(size, self.batch_size)
        steps = self.steps + min(-(-self.steps // 3), -(-_JUDGED // step))
        return -(-steps // -(-size // step))

    def allows(self, plan: StagePlan, move: Move) -> bool:
        """Whether a merge can be made under `plan`: of neighbours, and, where `tied`, in every stage that uses it."""
        try:
            merged = move.apply(plan, untied=False)
        except ValueError:
            return False
        return not (self.tied and _left_out(plan, merged, move))

    def apply(self, plan: StagePlan, move: Move, **facts: Any) -> StagePlan:
        """The plan after a merge; the block gets weights of its own only where another stage goes on with the old ones.

        Args:
            plan: the plan before.
            move: a merge that `allows` accepts.
            **facts: of the history, as of `StagePlan.merge`.
        """
        untied = bool(_left_out(plan, move.apply(plan, untied=False), move))
        assert not (untied and self.tied)
        return move.apply(plan, untied=untied, **facts)


def merging_stages(plan: StagePlan, merged: StagePlan, move: Move) -> dict[Stage, tuple[int, ...]]:
    """Per stage that `move` merges in, the original blocks that the merged one stands for."""
    assert move.into is not None
    runs = {stage: merged.merged[stage].get(move.into, ()) for stage in STAGES}
    return {stage: run for stage, run in runs.items() if run and run != plan.merged[stage].get(move.into)}


def _left_out(plan: StagePlan, merged: StagePlan, move: Move) -> set[Stage]:
    """Stages that go on using the shared weights of the merged block without merging."""
    users = {stage for stage in STAGES if move.into in merged.blocks(stage)}
    if move.into in merged.kv_only:
        users.add("prefill")
    return {s for s in users - set(merging_stages(plan, merged, move)) if move.into not in merged.untied[s]}
