"""The energy of a plan: mean KL(teacher || student) over calibration responses, under the contract.

An evaluation takes batch after batch, the most informative ones first. Every batch can only add to the energy. So the
evaluation of a plan stops as soon as the plan cannot win, and can continue later where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Literal

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.fingerprint import described, search_fingerprint
from pdtrim_pl.evaluation.journal import Journal, Sums
from pdtrim_pl.evaluation.neighbours import Candidate, Neighbours
from pdtrim_pl.evaluation.schedule import BatchOrder, Runner, race
from pdtrim_pl.evaluation.spread import shared_steps
from pdtrim_pl.evaluation.teacher import TeacherReference
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.staged import StagedCausalLM

log = logging.getLogger(__name__)

Measure = Literal["kl", "nll"]


@dataclass(frozen=True)
class Energy:
    """Means over all response tokens of the calibration set, in nats."""

    kl: float
    """KL(teacher || student)."""
    nll: float
    """Negative log-likelihood under the student."""


@dataclass(frozen=True)
class SearchMemory:
    """Maximum memory of a search on the device of the models, in bytes."""

    base: int = 4 * 2**30
    """For the base plan: prompt caches, and hidden states between blocks. If they do not fit, hidden states of fewer
    blocks are kept, and then of fewer calibration batches."""
    teacher: int = 2 * 2**30
    """For the teacher's probabilities, in fp32. For batches that do not fit, the teacher's head runs every time."""


class Evaluator:
    """Evaluates plans of one student on one calibration set. The teacher runs once.

    Args:
        student: the model under evaluation. Its weights must not change during the lifetime of the evaluator.
        teacher: the reference, under its own plan.
        batches: the calibration set, the same on every rank.
        device: device of both models.
        memory: memory limits.
        ranks: the batches are split among the ranks. The energies are the same as on one rank.
        journal: file of evaluations. A plan and batch found there are not evaluated again.

    Raises:
        UserError: the calibration set is empty.
    """

    def __init__(
        self, student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], *,
        device: torch.device | str = "cpu", memory: SearchMemory = SearchMemory(), ranks: Parallel = Parallel(),
        journal: Path | None = None,
    ) -> None:  # fmt: skip
        self.student, self.ranks = student, ranks
        self.count = len(batches)
        self.tokens = sum(int(batch.response_mask.sum()) for batch in batches)
        if not self.tokens:
            raise UserError("The calibration set has no response token: see `parts.calibration` of the data.")
        peers = ranks.peers(shared_steps(ranks, batches))
        mine = [group[ranks.rank % len(group)].on(device) for group in peers]
        self.neighbours = Neighbours(student, mine, memory.base, peers)
        if self.neighbours.kept < len(mine):
            log.warning(
                "What candidates have in common is kept for %d of %d calibration batches, as much as fits into "
                "`memory.base` of %.1f GiB. On the others, candidates run all blocks. Raise it, or calibrate on less.",
                self.neighbours.kept, len(mine), memory.base / 2**30,
            )  # fmt: skip
        self.reference = TeacherReference(teacher, mine, device=device, peers=peers, probabilities=memory.teacher)
        ranks.together(self.reference.prepare)
        self._next_base: Candidate | None = None
        self.order = BatchOrder(self.count, ranks)
        search = "" if journal is None else search_fingerprint(student, teacher, batches, ranks)
        self.journal = Journal(journal, search, ranks)

    @property
    def block_tokens(self) -> int:
        """Work of this rank on the student so far, as the number of (token, block) pairs that ran."""
        return self.neighbours.block_tokens

    def candidate(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Candidate:
        """A candidate of a plan and a policy; the student's policy by default."""
        policy = policy or self.student.policy
        return Candidate(plan, None if policy is None else policy.restricted_to(plan))

    def energy(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> float:
        """Mean KL(teacher || student) over all response tokens, nats; under the student's policy by default."""
        return self.measure(plan, policy).kl

    def measure(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Energy:
        """KL and NLL, means over all response tokens; under the student's policy by default."""
        known = self._extended(self.candidate(plan, policy))
        return Energy(known.kl / self.tokens, known.nll / self.tokens)

    def energy_below(self, plan: StagePlan, limit: float, policy: KVRetentionPolicy | None = None) -> float | None:
        """The energy in nats if it is below `limit`, else None. The evaluation stops when the limit is reached."""
        energy = self._extended(self.candidate(plan, policy), limit).kl / self.tokens
        return energy if energy < limit else None

    def best(
        self, candidates: Sequence[Candidate], *, by: Measure = "kl",
        progress: Callable[[int], None] = lambda evaluated: None,
    ) -> tuple[int, float]:  # fmt: skip
        """The index of the best candidate and its mean in nats. Of equal candidates, the one of lower index wins.

        The candidate with the lowest sum so far always gets the next batch. So the others are evaluated only as far as
        is needed to exclude them.

        Args:
            candidates: the candidates to compare.
            by: what to minimise: KL to the teacher, or negative log-likelihood.
            progress: called with the number of batches evaluated so far.
        """
        return race([self._runner(candidate, by) for candidate in candidates], self.order, progress)

    def rebase(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> None:
        """Make `plan` the base plan, from whose results its neighbours are computed.

        The base is computed at the next evaluation that is not in the journal.
        """
        self._next_base = self.candidate(plan, policy)

    def _extended(self, candidate: Candidate, limit: float = inf) -> Sums:
        """Sums over all batches, or over fewer if their KL already reaches the limit."""
        text = described(candidate)
        while not self._complete(text) and self._sum(text).kl / self.tokens < limit:
            self._extend(candidate, text)
        return self._sum(text)

    def _runner(self, candidate: Candidate, by: Measure) -> Runner:
        text = described(candidate)
        return Runner(
            bound=lambda: float(getattr(self._sum(text), by)) / self.tokens,
            started=lambda: bool(self.journal.known(text)),
            finished=partial(self._complete, text),
            extend=partial(self._extend, candidate, text),
        )

    def _complete(self, text: str) -> bool:
        return len(self.journal.known(text)) == self.count

    def _sum(self, text: str) -> Sums:
        """Sums over the batches evaluated so far. They are added in a fixed order, so that rounding is reproducible."""
        known = self.journal.known(text)
        return Sums(sum(known[batch].kl for batch in sorted(known)), sum(known[batch].nll for batch in sorted(known)))

    @torch.no_grad()
    def _extend(self, candidate: Candidate, text: str) -> None:
        """Evaluate one more batch on every rank that has one left."""
        self.ranks.leave_if_asked()
        chosen = self.order.next(self.journal.known(text))
        mine = chosen[self.ranks.rank]
        if not self.ranks.whole:  # weights are sharded: a rank without a batch must run one with the others
            mine = next(batch for batch in chosen if batch is not None)
        every = self.ranks.together(
            lambda: None if mine is None else tuple(self._sums(candidate, mine // self.ranks.size))
        )
        # Overflow counts as infinite energy. If all candidates overflow, the search reports it.
        self.journal.add(
            text,
            {
                batch: Sums(*(inf if isnan(value) else value for value in found))
                for batch, found in zip(chosen, every, strict=True)
                if batch is not None and found is not None
            },
        )
        total = self._sum(text).kl
        if self._complete(text) and isfinite(total):
            self.order.learn(self.journal.known(text), total)

    def _sums(self, candidate: Candidate, index: int) -> Sums:
        """KL and NLL of one batch of this rank, summed over its response tokens in fp64."""
        if self._next_base is not None:
            self.neighbours.rebase(self._next_base)
            self._next_base = None
        hidden = self.neighbours.response(candidate, index)
        return Sums(*self.reference.compare(index, hidden, self.student.compared_logits))
