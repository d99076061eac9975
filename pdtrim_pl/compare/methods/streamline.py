"""LLM-Streamline: replace a span of blocks by one block that is trained to reproduce its output."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.nn import functional as F
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method
from pdtrim_pl.errors import UserError
from pdtrim_pl.merging import FittedRuns, Merging
from pdtrim_pl.merging.recording import record
from pdtrim_pl.plan import STAGES, Relation
from pdtrim_pl.search.merges import least_kl, neighbours
from pdtrim_pl.staged import StagedCausalLM

log = logging.getLogger(__name__)


class ReplaceSpan(Method):
    """Replaces `count + 1` neighbouring blocks (a span) by one block, which is trained locally on the token budget.

    LLM-Streamline (arXiv 2403.19135) with mean squared error chooses the span whose input and output are most similar.
    With `screening_share`, which is our addition, one block is fitted briefly to every span, and the span with the
    least KL to the teacher is chosen.

    Args:
        learning_rate: peak learning rate of the local training, relative as in `Merging`.
        relation: how the blocks of the two stages relate.
        share: share of the token budget for the local training. Rows that start from this one can use the rest.
        batch_size: examples in a step.
        screening_share: share of the token budget for the brief fits; it is part of `share`. 0 chooses the span by
            similarity.
        trailing_blocks: number of blocks after the span that are trained with it; see `fit_runs`.

    Raises:
        UserError: `share` is outside (0, 1], `screening_share` is outside [0, `share`], or `trailing_blocks` is
            negative.
    """

    def __init__(
        self, learning_rate: float = 5e-2, relation: Relation = "unified", share: float = 1.0, batch_size: int = 1,
        screening_share: float = 0.0, trailing_blocks: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 < share <= 1:
            raise UserError(f"`share` is {share}: give a share of the token budget, above 0 and at most 1.")
        if not 0 <= screening_share <= share:
            raise UserError(
                f"`screening_share` is {screening_share}: give a share of the token budget, at least 0 and at most "
                "`share`."
            )
        if trailing_blocks < 0:
            raise UserError(f"`trailing_blocks` is {trailing_blocks}: give a number of blocks, 0 for none.")
        self.learning_rate, self.relation, self.share, self.batch_size = learning_rate, relation, share, batch_size
        self.screening_share, self.trailing_blocks = screening_share, trailing_blocks

    @property
    @override
    def trains(self) -> bool:
        return True

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        plan = bench.full(self.relation)
        student = bench.student(Found(plan))
        criterion = "fitted_kl" if self.screening_share else "streamline"
        span, score = (self._least_kl if self.screening_share else most_alike)(bench, student, count)
        with bench.unmetered():
            fitted, tokens = self._fit(bench, student, [span], self.share, self.trailing_blocks)
        run = fitted.runs[0]
        student.offer(fitted.runs)
        plan = run.move.apply(plan, untied=False, criterion=criterion, score=score)
        student.apply_plan(plan)
        return Found(plan, None, bench.changed(student), tokens)

    def _fit(
        self,
        bench: Bench,
        student: StagedCausalLM,
        runs: Sequence[tuple[int, ...]],
        share: float,
        trailing_blocks: int = 0,
    ) -> tuple[FittedRuns, int]:
        """Fit one block to each run with a share of the token budget. Returns the fits and the tokens of their text."""
        batches, tokens = bench.texts.training_batches(int(share * bench.training.tokens), self.batch_size)
        settings = Merging(-1.0, len(batches), self.batch_size, self.learning_rate, pairs_at_once=1)
        return bench.fit(student, batches, runs, settings, trailing_blocks), tokens

    def _least_kl(self, bench: Bench, student: StagedCausalLM, count: int) -> tuple[tuple[int, ...], float]:
        """The span with the least KL on the calibration set after a brief fit, and this KL in nats."""
        with bench.unmetered():
            fitted, _ = self._fit(bench, student, spans(bench, student, count), self.screening_share)
        bench.charge(fitted)
        best, energy = least_kl(bench.context(student), student.plan, fitted.runs)
        run = fitted.runs[best].move.run
        log.info("  blocks %d to %d: KL %.4f after a brief fit", run[0], run[-1], energy)
        return run, energy


def most_alike(bench: Bench, student: StagedCausalLM, count: int) -> tuple[tuple[int, ...], float]:
    """The span of `count + 1` blocks with the highest mean cosine of its input and output, and 1 minus this cosine.

    Raises:
        UserError: the guards allow no span of this length.
    """
    sums = dict.fromkeys(spans(bench, student, count), 0.0)
    places = {place for span in sums for place in (span[0], span[-1] + 1)}
    tokens = 0
    for batch in bench.texts.calibration:
        seen = record(student, batch.on(bench.device), student.plan.boundary, places)
        for stage in STAGES:
            hidden, valid = seen.hidden[stage], seen.request.valid[stage]
            for span in sums:
                alike = F.cosine_similarity(hidden[span[0]].float(), hidden[span[-1] + 1].float(), dim=-1)
                sums[span] += float(alike[valid].sum())
            tokens += int(valid.sum())
    best = max(sums, key=sums.__getitem__)
    return best, 1.0 - sums[best] / tokens


def spans(bench: Bench, student: StagedCausalLM, count: int) -> list[tuple[int, ...]]:
    """All runs of `count + 1` neighbouring blocks that the guards allow.

    Raises:
        UserError: there is none.
    """
    found = neighbours(student.plan, "both", Merging(), bench.guards, count + 1)
    if not found:
        blocks = student.plan.model.num_blocks
        raise UserError(f"`rows.counts`: no {count + 1} neighbours of {blocks} blocks lie within {bench.guards}.")
    return found
