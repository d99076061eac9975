"""Response hidden states of plans that differ little from a base plan, computed from where they differ.

Shapes: B batch, T tokens of a stage, N response tokens of a batch without padding, H hidden.

The base keeps every prompt's cache, and the hidden states between blocks in both stages. A neighbour that first differs
at block l starts at l, in each stage at its own l; where only decode differs, prefill does not run at all.
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
"""Blocks between two kept hidden states, at most: rather fewer batches are kept than that a candidate runs more blocks
again that it has in common with the base."""


@dataclass(frozen=True)
class Candidate:
    """What is evaluated."""

    plan: StagePlan
    policy: KVRetentionPolicy | None = None
    """What crosses the boundary; None sends everything."""

    def weights(self, stage: Stage, block: int) -> object:
        """Tells apart the weights that a block may run with in a stage."""
        return self.plan.merged[stage].get(block), block in self.plan.untied[stage]

    def sends(self, block: int) -> object:
        """Tells apart what a block may send."""
        return None if self.policy is None else self.policy.rules.get(block)


@dataclass(frozen=True)
class _Trace:
    """One batch under the base."""

    encoded: StagedOutput
    """Prefill's cache, and its last hidden state [B, 1, H]."""
    inputs: Mapping[Stage, Mapping[int, Tensor]]
    """Hidden state that reaches some of the blocks a stage runs, [B, T, H]."""


class Neighbours:
    """Runs candidates on some batches, from what the base has in common with them.

    Args:
        student: its weights must not change while this lives.
        batches: requests, on the student's device.
        cache_bytes: most bytes to keep of a base: prompt caches, and hidden states, of every k-th block if not of all.
            Where a wide stride is not enough, only the first batches are kept; on the others every candidate runs from
            the beginning.
        peers: per batch, those of all ranks that run the same blocks at the same time, this rank's with them: all keep
            what the largest ones leave room for.
    """

    def __init__(
        self, student: StagedCausalLM, batches: Sequence[Batch], cache_bytes: int,
        peers: Sequence[Sequence[Batch]] | None = None,
    ) -> None:  # fmt: skip
        self.student, self.batches = student, batches
        self.block_tokens = 0
        """Work done so far: one for every token and block that ran."""
        self.stride, self.kept = self._share_out(cache_bytes, peers or [[batch] for batch in batches])
        self._base: Candidate | None = None
        self._traces: list[_Trace] = []

    @torch.no_grad()
    def rebase(self, candidate: Candidate) -> None:
        """Keep what the neighbours of `candidate` have in common with it."""
        if not self.kept or candidate == self._base:
            return
        known = self._base
        if known is not None and known.plan.boundary != candidate.plan.boundary:
            self._traces, known = [], None
        self._base = None  # while some traces are of the old base, and some of the new one
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
        """Final hidden states of one batch's response tokens, [N, H]."""
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
        parts = [encoded.hidden[:, -1:]] if plan.boundary == "prefill" else []
        fed, fed_valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            resume = _resume(trace, "decode", starts)
            self._count(plan, "decode", fed_valid, resume)
            out = self.student.decode(fed, sent, fed_valid, plan=plan, keep_cache=False, resume=resume)
            parts.append(out.hidden)
        return torch.cat(parts, dim=1)[batch.response_mask]

    def _traced(
        self, candidate: Candidate, batch: Batch, old: _Trace | None, starts: Mapping[Stage, int | None]
    ) -> _Trace:
        """One batch under a new base, from where it differs from the old one."""
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
        """Per stage, the first block whose work may differ from a base's; None where none does.

        Args:
            candidate: what is to be run.
            base: what was run.
            trace: what was kept of it.
            wanted: blocks whose KV is wanted of prefill.
        """
        plan = candidate.plan
        pairs = {stage: (set(plan.blocks(stage)), set(base.plan.blocks(stage))) for stage in STAGES}
        differs: dict[Stage, set[int]] = {stage: new ^ old for stage, (new, old) in pairs.items()}
        # What decode alone adds or loses leaves prefill as it was, if the base has kept the KV that is now wanted.
        differs["prefill"] |= set(wanted) - set(trace.encoded.cache.blocks)
        for stage in STAGES:
            new, old = pairs[stage]
            differs[stage] |= {b for b in new & old if candidate.weights(stage, b) != base.weights(stage, b)}
        new, old = pairs["decode"]
        differs["decode"] |= {block for block in new & old if candidate.sends(block) != base.sends(block)}
        # From where prefill differs, the KV that decode reads differs too.
        return {
            "prefill": min(differs["prefill"], default=None),
            "decode": min(differs["decode"] | differs["prefill"], default=plan.model.num_blocks),
        }

    def _count(self, plan: StagePlan, stage: Stage, valid: Tensor, resume: Resume | None) -> None:
        first = 0 if resume is None else resume.block
        self.block_tokens += int(valid.sum()) * sum(block >= first for block in plan.blocks(stage))

    def _share_out(self, cache_bytes: int, peers: Sequence[Sequence[Batch]]) -> tuple[int, int]:
        """Keep the input of every so many blocks, of so many batches."""
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
    """Blocks whose KV a base keeps: a neighbour may put a block back into decode, so of all that prefill runs too."""
    return tuple(sorted({*plan.decode, *plan.prefill}))


def _resume(trace: _Trace | None, stage: Stage, starts: Mapping[Stage, int | None]) -> Resume | None:
    """The latest kept place at or before the start, or a closed gate's, whose state is that of the next open one."""
    start = starts.get(stage)
    if trace is None or start is None:
        return None
    inputs = trace.inputs[stage]
    kept = [block for block in inputs if block <= start]
    return Resume(max(kept), inputs[max(kept)], trace.encoded.cache.blocks) if kept else None
