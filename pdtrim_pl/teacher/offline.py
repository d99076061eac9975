"""Training without a teacher: what a run does in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pdtrim_pl.data import Batch, PromptResponseDataModule
from pdtrim_pl.losses import Distilled, LossTerm
from pdtrim_pl.losses.stored import run_alone, stored_terms, temperature_of
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.staged.rows import RowCounts
from pdtrim_pl.teacher.of_run import identity_of, training_keys
from pdtrim_pl.teacher.reader import StoredTeacher


class OfflineTeacher:
    """The stored teacher of a run.

    Args:
        folder: what `pdtrim cache-teacher` wrote.
        pair: settings of the run's models.
        data: its training part.
        losses: those of the run.

    Raises:
        UserError: the cache is not of this run, or a loss needs more than it keeps.
    """

    def __init__(
        self, folder: Path, pair: ModelPair, data: PromptResponseDataModule, losses: Sequence[LossTerm]
    ) -> None:  # fmt: skip
        self.stored = StoredTeacher(folder)
        self.terms = stored_terms(losses, self.stored.index.making.kind)
        """The losses, in the form that reads what is stored."""
        keys = training_keys(data)
        self.stored.check(identity_of(pair, data, temperature_of(losses), keys), keys)
        self._next: Tensor | None = None

    def fetch(self, batch: Batch) -> None:
        """Read what is stored of the next batch, while the batch is still in host memory."""
        self._next = self.stored.rows(batch)

    def distilled(
        self, student: StagedCausalLM, batch: Batch, min_chunks: int, counts: RowCounts | None = None,
        gather_heads: bool = False,
    ) -> Distilled:  # fmt: skip
        """Run the student on the batch that was fetched, or on any other; see `run_alone`."""
        rows, self._next = self.stored.rows(batch) if self._next is None else self._next, None
        return run_alone(
            student, batch, rows.to(batch.prompt_ids.device, non_blocking=True), min_chunks, counts, gather_heads
        )
