"""Evaluate plans that differ little from a base plan: only the blocks from the first difference on run again.

Shapes: B batch, T tokens of a stage, N response tokens of a batch without padding, H hidden.

For the base plan, the cache of every prompt and the hidden states between blocks of both stages are kept. A neighbour
whose first difference is block l starts at block l. Each stage has its own l. If only decode differs, prefill does not
run at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Stage, StagePlan
from pdtrim_pl.staged import Request, StagedCausalLM, StagedOutput
from pdtrim_pl.staged.gate import Observer, Resume

WIDEST = 4
"""Maximum distance in blocks between two kept hidden states. If memory does not suffice for this distance, fewer
batches are kept: a larger distance would make candidates repeat too many blocks that they share with the base."""


@dataclass(frozen=True)
class Candidate:
    """A plan and a policy to evaluate."""

    plan: StagePlan
    policy: KVRetentionPolicy | None = None
    """What prefill sends to decode; None sends everything."""

    def weights(self, stage: Stage, block: int) -> object:
        """A key for the weights that a block uses in a stage: equal keys mean equal weights."""
        plan = self.plan
        return plan.merged[stage].get(block), block in plan.untied[stage], plan.widths[stage].get(block)

    def sends(self, block: int) -> object:
        """A key for what a block sends: equal keys mean that it sends the same."""
        return None if self.policy is None else self.policy.rules.get(block)


@dataclass(frozen=True)
class _Trace:
    """What is kept of one batch under the base plan."""

    encoded: StagedOutput
    """The cache of prefill, and its last hidden state, [B, 1, H]."""
    inputs: Mapping[Stage, Mapping[int, Tensor]]
    """Per stage: original index -> the hidden state that reaches this block, [B, T, H], for some of its blocks."""


class Neighbours:
    """Runs candidates on some batches, and reuses the work that they share with the base plan.

    Args:
        student: the model. Its weights must not change during the lifetime of this object.
        batches: requests, on the student's device.
        cache_bytes: maximum number of bytes to keep for the base plan: prompt caches, and hidden states. If they do not
            fit, hidden states of only every k-th block are kept. If that does not fit either, only the first batches
            are kept; on the others every candidate runs all blocks.
        peers: for each batch, the batches that all ranks run at the same time, this one included. All ranks keep as
            many as the largest of them allow. By default, each batch is alone.
    """

    def __init__(
        self, student: StagedCausalLM, batches: Sequence[Batch], cache_bytes: int,
        peers: Sequence[Sequence[Batch]] | None = None,
    ) -> None:  # fmt: skip
        self.student, self.batches = student, batches
        self.block_tokens = 0
        """Work done so far, as the number of (token, block) pairs that ran."""
        self.stride, self.kept = self._within_memory(cache_bytes, peers or [[batch] for batch in batches])
        self._base: Candidate | None = None
        self._traces: list[_Trace] = []

    @torch.no_grad()
    def rebase(self, candidate: Candidate) -> None:
        """Make `candidate` the base: run it, and keep the results that its neighbours share with it."""
        if not self.kept or candidate == self._base:
            return
        known = self._base
        if known is not None and known.plan.boundary != candidate.plan.boundary:
            self._traces, known = [], None
        self._base = None  # an error below would leave traces of both the old and the new base
        if known is None:
            self._traces = [self._traced(candidate, batch, None, {}) for batch in self.batches[: self.kept]]
        else:
            for index, old in enumerate(self._traces):
                batch = self.batches[index]
                starts = self._first_differences(candidate, known, old, _wide(candidate.plan))
                self._traces[index] = self._traced(candidate, batch, old, starts)
        self._base = candidate

    @torch.no_grad()
    def response(self, candidate: Candidate, index: int) -> Tensor:
        """Final hidden states of the response tokens of one batch under a candidate, [N, H]."""
        batch, plan = self.batches[index], candidate.plan
        request = Request.of(*batch.request, plan.boundary)
        base = self._base
        based = base is not None and base.plan.boundary == plan.boundary and index < self.kept
        trace = self._traces[index] if based else None
        starts: Mapping[Stage, int | None] = {}
        if base is not None and trace is not None:
            starts = self._first_differences(candidate, base, trace, plan.decode)
        if trace is not None and starts["prefill"] is None:
            encoded = trace.encoded
        else:
            resume = _resume(trace, "prefill", starts)
            self._count(plan, "prefill", request.valid["prefill"], resume)
            tokens, valid = request.tokens["prefill"], request.valid["prefill"]
            encoded = self.student.prefill(tokens, valid, plan=plan, resume=resume)
        sent = encoded.cache.retained(candidate.policy)
        resume = _resume(trace, "decode", starts)
        if request.tokens["decode"].shape[1]:
            self._count(plan, "decode", request.valid["decode"], resume)
        return self.student.respond(request, encoded.hidden, sent, plan=plan, resume=resume)[batch.response_mask]

    def _traced(
        self, candidate: Candidate, batch: Batch, old: _Trace | None, starts: Mapping[Stage, int | None]
    ) -> _Trace:
        """Run one batch under a new base, starting where it differs from the old base."""
        plan = candidate.plan
        request = Request.of(*batch.request, plan.boundary)
        resumes = {stage: _resume(old, stage, starts) for stage in STAGES}
        inputs: dict[Stage, dict[int, Tensor]] = {stage: {} for stage in STAGES}
        for stage, resume in resumes.items():
            before = old.inputs[stage] if old is not None else {}
            last = plan.model.num_blocks if old is not None and starts[stage] is None else 0
            last = resume.block if resume is not None else last
            inputs[stage].update({block: hidden for block, hidden in before.items() if block < last})
        if old is not None and starts["prefill"] is None:
            encoded = old.encoded
        else:
            wide = replace(plan, decode=_wide(plan), relation="free", merged={"prefill": plan.merged["prefill"]})
            tokens, valid = request.tokens["prefill"], request.valid["prefill"]
            observer = self._keeping(plan, "prefill", inputs["prefill"])
            self._count(plan, "prefill", valid, resumes["prefill"])
            encoded = self.student.prefill(tokens, valid, plan=wide, observer=observer, resume=resumes["prefill"])
        fed, valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            observer = self._keeping(plan, "decode", inputs["decode"])
            self._count(plan, "decode", valid, resumes["decode"])
            self.student.decode(
                fed, encoded.cache.retained(candidate.policy), valid, plan=plan, keep_cache=False, observer=observer,
                resume=resumes["decode"],
            )  # fmt: skip
        return _Trace(replace(encoded, hidden=encoded.hidden[:, -1:]), inputs)

    def _keeping(self, plan: StagePlan, stage: Stage, inputs: dict[int, Tensor]) -> Observer:
        kept = {block for block in plan.blocks(stage) if block % self.stride == 0}

        def observe(block: int, before: Tensor, _: Tensor) -> None:
            if block in kept:
                inputs[block] = before

        return observe

    def _first_differences(
        self, candidate: Candidate, base: Candidate, trace: _Trace, wanted: Sequence[int]
    ) -> dict[Stage, int | None]:
        """Per stage, the first block whose input or output may differ from the base; None if prefill does not differ.

        Args:
            candidate: the candidate to run.
            base: the base that was run.
            trace: what was kept of the base.
            wanted: blocks whose keys and values prefill must produce.
        """
        plan = candidate.plan
        pairs = {stage: (set(plan.blocks(stage)), set(base.plan.blocks(stage))) for stage in STAGES}
        differs: dict[Stage, set[int]] = {stage: new ^ old for stage, (new, old) in pairs.items()}
        # A block that only decode adds does not change prefill, if the base has kept the KV of this block.
        differs["prefill"] |= set(wanted) - set(trace.encoded.cache.blocks)
        for stage in STAGES:
            new, old = pairs[stage]
            differs[stage] |= {b for b in new & old if candidate.weights(stage, b) != base.weights(stage, b)}
        new, old = pairs["decode"]
        differs["decode"] |= {block for block in new & old if candidate.sends(block) != base.sends(block)}
        # Where prefill differs, the KV that decode reads also differs.
        return {
            "prefill": min(differs["prefill"], default=None),
            "decode": min(differs["decode"] | differs["prefill"], default=plan.model.num_blocks),
        }

    def _count(self, plan: StagePlan, stage: Stage, valid: Tensor, resume: Resume | None) -> None:
        first = 0 if resume is None else resume.block
        self.block_tokens += int(valid.sum()) * sum(block >= first for block in plan.blocks(stage))

    def _within_memory(self, cache_bytes: int, peers: Sequence[Sequence[Batch]]) -> tuple[int, int]:
        """Stride in blocks between kept hidden states, and number of batches to keep, that fit into `cache_bytes`."""
        blocks = len(self.student.originals)
        cached = blocks * self.student.kv_shape.bytes_per_position
        hidden = blocks * self.student.model.config.hidden_size * self.student.model.dtype.itemsize
        prompts = [max(batch.prompt_ids.numel() for batch in group) for group in peers]
        responses = [max(batch.response_ids.numel() for batch in group) for group in peers]
        caches = [tokens * cached for tokens in prompts]
        states = [sum(tokens) * hidden for tokens in zip(prompts, responses, strict=True)]
        left = cache_bytes - sum(caches)
        if sum(states) <= left * WIDEST:
            return max(1, ceil(sum(states) / max(left, 1))), len(self.batches)
        ends = accumulate(cache + state / WIDEST for cache, state in zip(caches, states, strict=True))
        return WIDEST, sum(end <= cache_bytes for end in ends)


def _wide(plan: StagePlan) -> tuple[int, ...]:
    """Blocks whose KV the base keeps: those of D and of P, since a neighbour may put a block of P back into D."""
    return tuple(sorted({*plan.decode, *plan.prefill}))


def _resume(trace: _Trace | None, stage: Stage, starts: Mapping[Stage, int | None]) -> Resume | None:
    """Resume at the last block at or before the start of the stage whose input was kept; None to run all blocks."""
    start = starts.get(stage)
    if trace is None or start is None:
        return None
    inputs = trace.inputs[stage]
    kept = [block for block in inputs if block <= start]
    return Resume(max(kept), inputs[max(kept)], trace.encoded.cache.blocks) if kept else None
