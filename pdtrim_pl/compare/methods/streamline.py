"""LLM-Streamline: the most redundant span of blocks, replaced by one that is trained to do its work."""

from __future__ import annotations

from torch.nn import functional as F
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.method import Found, Method
from pdtrim_pl.merging import Merging
from pdtrim_pl.merging.recording import record
from pdtrim_pl.plan import STAGES, Relation
from pdtrim_pl.staged import StagedCausalLM


class ReplaceSpan(Method):
    """Replaces the `count + 1` neighbours whose input and output are most alike by one block, trained locally.

    LLM-Streamline (arXiv 2403.19135) with its mean squared error, on the token budget of the rows that train.

    Args:
        learning_rate: highest rate of the local training, relative as in `Merging`.
        batch_size: examples of its steps.
        relation: how the stages relate.
        share: of the token budget that the local training takes; the rest is left to rows that start from this one.

    Raises:
        ValueError: `share` outside (0, 1].
    """

    def __init__(
        self, learning_rate: float = 5e-2, relation: Relation = "unified", share: float = 1.0, batch_size: int = 1
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}: give a share of the token budget, above 0 and at most 1.")
        self.learning_rate, self.relation, self.share, self.batch_size = learning_rate, relation, share, batch_size

    @property
    @override
    def trains(self) -> bool:
        return True

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        plan = bench.full(self.relation)
        student = bench.student(Found(plan))
        span = most_alike(bench, student, count)
        budget = int(self.share * bench.training.tokens)
        batches, tokens = bench.texts.training_batches(budget, self.batch_size)
        settings = Merging(-1.0, len(batches), self.batch_size, self.learning_rate, pairs_at_once=1)
        with bench.unmetered():
            fitted = bench.fit(student, batches, [span], settings)
        run = fitted.runs[0]
        student.offer(fitted.runs)
        plan = run.move.apply(plan, untied=False, criterion="streamline", score=1.0 - run.plain_cosine)
        student.apply_plan(plan)
        return Found(plan, None, bench.changed(student), tokens)


def most_alike(bench: Bench, student: StagedCausalLM, count: int) -> tuple[int, ...]:
    """The `count + 1` neighbours with the highest mean cosine of input and output, within the guards.

    Raises:
        ValueError: the guards leave no span as long.
    """
    blocks = student.plan.model.num_blocks
    firsts = range(bench.guards.protect_first, blocks - bench.guards.protect_last - count)
    if not firsts:
        raise ValueError(f"`rows.counts`: no {count + 1} neighbours of {blocks} blocks lie within {bench.guards}.")
    sums = dict.fromkeys(firsts, 0.0)
    for batch in bench.texts.calibration:
        places = {*firsts, *(first + count + 1 for first in firsts)}
        seen = record(student, batch.on(bench.device), student.plan.boundary, places)
        for stage in STAGES:
            hidden, valid = seen.hidden[stage], seen.request.valid[stage]
            for first in firsts:
                alike = F.cosine_similarity(hidden[first].float(), hidden[first + count + 1].float(), dim=-1)
                sums[first] += float(alike[valid].sum())
    best = max(firsts, key=lambda first: (sums[first], -first))
    return tuple(range(best, best + count + 1))
