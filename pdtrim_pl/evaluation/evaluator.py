"""The energy of a plan: mean KL(teacher || student) over calibration responses, under the contract.

An evaluation takes batch after batch, those first that tell most. Each can only add to the energy, so a plan is given
up as soon as it cannot win, and continued later from where it stood.
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
    """Means over the calibration responses, nats."""

    kl: float
    """KL(teacher || student)."""
    nll: float
    """Negative log-likelihood under the student."""


@dataclass(frozen=True)
class SearchMemory:
    """Most bytes that a search keeps, on the models' device."""

    base: int = 4 * 2**30
    """Bytes for the base plan: prompt caches, and hidden states, of every k-th block if not of all; of some calibration
    batches where they do not fit for all."""
    teacher: int = 2 * 2**30
    """Bytes for the teacher's probabilities, fp32, batch by batch; where they do not fit, its head runs again."""


class Evaluator:
    """Evaluates plans of one student on one calibration set; the teacher runs once.

    Args:
        student: its weights must not change while the evaluator lives.
        teacher: the reference, under its own plan.
        batches: the calibration set, the same on every rank.
        device: where both models are.
        memory: how much may be kept.
        ranks: batches are split among them; the energies are those of one rank.
        journal: file of evaluations; what it knows is not evaluated again.

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
                "`memory.base` of %.1f GiB; on the others candidates run all blocks. Raise it, or calibrate on less.",
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
        """This rank's work on the student so far: one for every token and block that ran."""
        return self.neighbours.block_tokens

    def candidate(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Candidate:
        """A plan under a policy, by default the student's."""
        policy = policy or self.student.policy
        return Candidate(plan, None if policy is None else policy.restricted_to(plan))

    def energy(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> float:
        """Mean KL to the teacher over all response tokens, nats, under `policy`, by default the student's."""
        return self.measure(plan, policy).kl

    def measure(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Energy:
        """Means over all response tokens under `plan` and `policy`, by default the student's."""
        known = self._extended(self.candidate(plan, policy))
        return Energy(known.kl / self.tokens, known.nll / self.tokens)

    def energy_below(self, plan: StagePlan, limit: float, policy: KVRetentionPolicy | None = None) -> float | None:
        """The energy if it is below `limit`, else None, as soon as that is certain."""
        energy = self._extended(self.candidate(plan, policy), limit).kl / self.tokens
        return energy if energy < limit else None

    def best(
        self, candidates: Sequence[Candidate], *, by: Measure = "kl",
        progress: Callable[[int], None] = lambda evaluated: None,
    ) -> tuple[int, float]:  # fmt: skip
        """The index of the best candidate, and its energy; the lower index where two are equal.

        The one that may still be best is always the next to see a batch, so all others are evaluated no further than
        it takes to be certain.

        Args:
            candidates: what to compare.
            by: KL to the teacher, or negative log-likelihood, nats.
            progress: called with the number of batches evaluated so far.
        """
        return race([self._runner(candidate, by) for candidate in candidates], self.order, progress)

    def rebase(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> None:
        """Keep what `plan`'s neighbours have in common with it, from the next evaluation on that is not known."""
        self._next_base = self.candidate(plan, policy)

    def _extended(self, candidate: Candidate, limit: float = inf) -> Sums:
        """Sums over all batches, or over some where their KL is certain to reach the limit."""
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
        """Of the batches that are known, added in their own order, so that the total does not depend on any other."""
        known = self.journal.known(text)
        return Sums(sum(known[batch].kl for batch in sorted(known)), sum(known[batch].nll for batch in sorted(known)))

    @torch.no_grad()
    def _extend(self, candidate: Candidate, text: str) -> None:
        """One more batch, or one more on every rank that has one left."""
        self.ranks.leave_if_asked()
        chosen = self.order.next(self.journal.known(text))
        mine = chosen[self.ranks.rank]
        if not self.ranks.whole:  # run it in any case, as all others do
            mine = next(batch for batch in chosen if batch is not None)
        every = self.ranks.together(
            lambda: None if mine is None else tuple(self._sums(candidate, mine // self.ranks.size))
        )
        # A candidate that overflows is no worse than impossible; where all do, the search says so.
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
        """KL and NLL of one of this rank's batches, summed over its response tokens in fp64."""
        if self._next_base is not None:
            self.neighbours.rebase(self._next_base)
            self._next_base = None
        hidden = self.neighbours.response(candidate, index)
        return Sums(*self.reference.compare(index, hidden, self.student.compared_logits))
