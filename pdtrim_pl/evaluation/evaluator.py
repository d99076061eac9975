"""The energy of a plan: mean KL(teacher || student) over calibration responses, under the contract.

Shapes: N response tokens of a batch without padding, H hidden, V vocabulary.

An evaluation takes batch after batch, those first that tell most. Each can only add to the energy, so a plan is given
up as soon as it cannot win, and continued later from where it stood.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pdtrim_pl.compat import attention_of
from pdtrim_pl.data.collate import Batch, fingerprint
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.journal import Journal, Sums
from pdtrim_pl.evaluation.neighbours import Candidate, Neighbours
from pdtrim_pl.evaluation.quality import CHUNK_TOKENS, Reference, final_hidden, score_tokens
from pdtrim_pl.evaluation.spread import shared_steps
from pdtrim_pl.losses import chunks
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, StagePlan
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
class Memory:
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
        device: torch.device | str = "cpu", memory: Memory = Memory(), ranks: Parallel = Parallel(),
        journal: Path | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.ranks = student, teacher, ranks
        self.count = len(batches)
        self.tokens = sum(int(batch.response_mask.sum()) for batch in batches)
        if not self.tokens:
            raise UserError("The calibration set has no response token: see `parts.calibration` of the data.")
        peers = ranks.peers(shared_steps(ranks, batches))
        self.batches = [group[ranks.rank % len(group)].on(device) for group in peers]
        self.targets = [batch.response_ids[batch.response_mask] for batch in self.batches]
        self.neighbours = Neighbours(student, self.batches, memory.base, peers)
        if self.neighbours.kept < len(self.batches):
            log.warning(
                "What candidates have in common is kept for %d of %d calibration batches, as much as fits into "
                "`memory.base` of %.1f GiB; on the others candidates run all blocks. Raise it, or calibrate on less.",
                self.neighbours.kept, len(self.batches), memory.base / 2**30,
            )  # fmt: skip
        lengths = [max(int(batch.response_mask.sum()) for batch in group) for group in peers]
        self._chunks = [len(chunks(length, CHUNK_TOKENS)) for length in lengths]
        """Per batch, how often the heads are called: ranks that keep step call them equally often."""
        self.teacher_hidden: list[Tensor] = []
        self.references: list[Reference | None] = []
        ranks.together(lambda: self._run_teacher(memory.teacher, lengths))
        self._next_base: Candidate | None = None
        self.weight = [0.0] * self.count
        """How much of the energy each batch has held so far: those that hold most come first, and give up most."""
        self.journal = Journal(journal, self.fingerprint(batches) if journal is not None else "", ranks)

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
        texts = [described(candidate) for candidate in candidates]
        evaluated = 0

        def bound(index: int) -> tuple[float, int]:
            return getattr(self._sum(texts[index]), by) / self.tokens, index

        def extend(index: int) -> None:
            nonlocal evaluated
            self._extend(candidates[index], texts[index])
            evaluated += 1
            progress(evaluated)

        for index, text in enumerate(texts):
            if not self.journal.known(text):
                extend(index)
        heap = [bound(index) for index in range(len(candidates))]
        heapq.heapify(heap)
        # The leader to the end first: it is likely to be needed, and teaches which batches tell most.
        leader = heap[0][1]
        while not self._complete(texts[leader]) and not any(self.weight):
            extend(leader)
        heapq.heapreplace(heap, bound(leader))
        while True:
            index = heap[0][1]
            if self._complete(texts[index]):
                return index, float(getattr(self._sum(texts[index]), by)) / self.tokens
            extend(index)
            heapq.heapreplace(heap, bound(index))

    def rebase(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> None:
        """Keep what `plan`'s neighbours have in common with it, from the next evaluation on that is not known."""
        self._next_base = self.candidate(plan, policy)

    def fingerprint(self, batches: Sequence[Batch]) -> str:
        """What energies depend on besides plan and policy: weights, arithmetic, and the calibration set."""
        sums = [
            _total(self.ranks.own_part(parameter))
            for model in (self.student, self.teacher)
            for parameter in model.parameters()
        ]
        offers = [
            (block, *merge, sum(map(_total, weights.parameters())))
            for block, gate in self.student.gates.items()
            for merge, weights in gate.offers.items()
        ]
        held = self.ranks.agree(sums) if self.ranks.whole else self.ranks.gather(sums)
        device = self.student.model.device.type
        arithmetic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        sizes = [len(batch.response_mask) for batch in batches]
        attention = attention_of(self.student.model)
        offered, plan = self.ranks.agree(offers), self.teacher.plan.to_json()
        text = f"{arithmetic} {attention} {sizes} {held} {offered} {plan} {fingerprint(batches)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _extended(self, candidate: Candidate, limit: float = inf) -> Sums:
        """Sums over all batches, or over some where their KL is certain to reach the limit."""
        text = described(candidate)
        while not self._complete(text) and self._sum(text).kl / self.tokens < limit:
            self._extend(candidate, text)
        return self._sum(text)

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
        chosen = self._next(self.journal.known(text))
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
        if self._complete(text):
            self._weigh(text)

    def _next(self, known: Mapping[int, Sums]) -> list[int | None]:
        """For every rank, the batch that is likely to tell most of those that it has left; batch `i` is the
        `i // size`-th of rank `i % size`, and ranks that keep step take those of one place together."""
        left, size = set(range(self.count)) - set(known), self.ranks.size
        if self.ranks.whole:
            order = sorted(left, key=lambda batch: (-self.weight[batch], batch))
            return [next((batch for batch in order if batch % size == rank), None) for rank in range(size)]
        told = dict.fromkeys(sorted({batch // size for batch in left}), 0.0)
        for batch in left:
            told[batch // size] += self.weight[batch]
        place = max(told, key=told.__getitem__)
        return [batch if batch in left else None for batch in range(place * size, (place + 1) * size)]

    def _weigh(self, text: str) -> None:
        """Learn from a plan that was evaluated on all batches how much of the energy each of them holds."""
        known, total = self.journal.known(text), self._sum(text).kl
        if not isfinite(total):
            return
        for batch, sums in known.items():
            self.weight[batch] += sums.kl / total if total > 0 else 0.0

    def _sums(self, candidate: Candidate, index: int) -> Sums:
        """KL and NLL of one of this rank's batches, summed over its response tokens in fp64."""
        if self._next_base is not None:
            self.neighbours.rebase(self._next_base)
            self._next_base = None
        hidden = self.neighbours.response(candidate, index)
        reference = self.references[index]
        if reference is not None:
            compared = reference.compare(
                self.student.logits, hidden, self.targets[index], min_chunks=self._chunks[index]
            )
            return Sums(*compared)
        heads = (self.student.logits, self.teacher.logits)
        scores = score_tokens(
            hidden, self.teacher_hidden[index], self.targets[index], *heads, min_chunks=self._chunks[index]
        )
        return Sums(float(scores.kl.double().sum()), float(scores.nll.double().sum()))

    @torch.no_grad()
    def _run_teacher(self, budget: int, lengths: Sequence[int]) -> None:
        """Keep its final hidden states, and of so many bytes its distributions."""
        self.teacher_hidden = [final_hidden(self.teacher, batch) for batch in self.batches]
        vocabulary = self.teacher.model.config.vocab_size
        for hidden, length, calls in zip(self.teacher_hidden, lengths, self._chunks, strict=True):
            budget -= length * vocabulary * torch.float32.itemsize
            reference = Reference.of(self.teacher.logits, hidden, min_chunks=calls) if budget >= 0 else None
            self.references.append(reference)


def _total(weights: Tensor) -> int:
    """Sum of the bit patterns, which does not depend on the number of threads; part by part, for memory's sake."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    parts = weights.detach().flatten().view(bits).split(2**24)
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def described(candidate: Candidate) -> str:
    """Everything of a candidate that its energy depends on, and nothing else."""
    plan, policy = candidate.plan, candidate.policy
    facts: dict[str, object] = {
        "boundary": plan.boundary,
        **{stage: list(plan.blocks(stage)) for stage in STAGES},
        "merged": {stage: {str(b): list(run) for b, run in plan.merged[stage].items()} for stage in STAGES},
        "untied": {stage: list(plan.untied[stage]) for stage in STAGES},
        "kv": {} if policy is None else {str(block): rule.to_json() for block, rule in policy.rules.items()},
    }
    return json.dumps(facts, separators=(",", ":"))
