"""The energy of a plan: mean KL(teacher || student) over calibration responses, under the contract.

Shapes: B batch, T tokens of a stage, N response tokens of a batch without padding, H hidden.

A search asks for plans that differ little from one it has just settled on. So the evaluator keeps that plan, its
*base*: every prompt's cache, and the hidden states between blocks in both stages. A neighbour that first differs at
block l then starts at l, in both stages; where only decode differs, prefill does not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch, fingerprint
from pdtrim_pl.evaluation.quality import final_hidden, score_tokens
from pdtrim_pl.plan import STAGES, Stage, StagePlan
from pdtrim_pl.policy import KVRetentionPolicy
from pdtrim_pl.staged import Request, StagedCausalLM, StagedOutput
from pdtrim_pl.staged.gate import Observer, Resume

Agree = Callable[[Any], Any]
"""From this rank's value to the one that all ranks use."""


@dataclass(frozen=True)
class Energy:
    """Means over the calibration responses, nats."""

    kl: float
    """KL(teacher || student)."""
    nll: float
    """Negative log-likelihood under the student."""


@dataclass(frozen=True)
class _Trace:
    """One batch under the base plan."""

    encoded: StagedOutput
    """Prefill's cache, and its last hidden state [B, 1, H]."""
    inputs: Mapping[Stage, Mapping[int, Tensor]]
    """Hidden state that reaches some of the blocks a stage runs, [B, T, H]."""


class Evaluator:
    """Evaluates plans of one student on one calibration set; the teacher runs once.

    Args:
        student: its weights must not change while the evaluator lives.
        teacher: the reference, under its own plan.
        batches: the calibration set.
        device: where both models are.
        cache_bytes: most bytes to keep of a base plan: prompt caches first, then hidden states, of every k-th block if
            not of all. Where not even the caches fit, every plan is evaluated from the beginning.
        agree: from this rank's figure to the one all ranks use, so that rounding never parts them.

    Raises:
        ValueError: the calibration set is empty.
    """

    def __init__(
        self, student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], *,
        device: torch.device | str = "cpu", cache_bytes: int = 4 * 2**30, agree: Agree = lambda value: value,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.agree = student, teacher, agree
        self.batches = [batch.on(device) for batch in batches]
        self.targets = [batch.response_ids[batch.response_mask] for batch in self.batches]
        self.tokens = sum(len(targets) for targets in self.targets)
        if not self.tokens:
            raise ValueError("The calibration set has no response token: see `parts.calibration` of the data.")
        with torch.no_grad():
            self.reference = [final_hidden(teacher, batch) for batch in self.batches]
        self.block_tokens = 0
        """Work done so far: one for every token and block that ran."""
        self.stride = self._stride(cache_bytes)
        self._base: StagePlan | None = None
        self._traces: list[_Trace] = []

    def energy(self, plan: StagePlan) -> float:
        """Mean KL to the teacher over all response tokens, nats, under the student's KV policy."""
        return self.measure(plan).kl

    @torch.no_grad()
    def measure(self, plan: StagePlan) -> Energy:
        """Means over all response tokens under `plan` and the student's KV policy."""
        sums = torch.stack([self._sums(plan, index) for index in range(len(self.batches))]).sum(dim=0)
        kl, nll = self.agree((sums / self.tokens).tolist())
        return Energy(kl, nll)

    @torch.no_grad()
    def energy_below(self, plan: StagePlan, limit: float) -> float | None:
        """The energy if it is below `limit`, else None, as soon as that is certain: each batch can only add to it."""
        total = 0.0
        for index in range(len(self.batches)):
            total += self.agree(float(self._sums(plan, index)[0]))
            if total / self.tokens >= limit:
                return None
        return total / self.tokens

    @torch.no_grad()
    def rebase(self, plan: StagePlan) -> None:
        """Keep what `plan`'s neighbours have in common with it."""
        if self.stride is None or plan == self._base:
            return
        self._traces = []  # free the old base before the new one is made
        self._base = None
        traces = [self._traced(plan, batch) for batch in self.batches]
        self._base, self._traces = plan, traces

    def fingerprint(self) -> str:
        """What energies depend on besides the plan: weights of both models, policy and calibration set."""
        sums = [
            float(parameter.detach().double().sum())
            for model in (self.student, self.teacher)
            for parameter in model.parameters()
        ]
        policy = None if self.student.policy is None else self.student.policy.to_json(self.student.plan)
        return f"{self.agree(sums)} {policy} {fingerprint(self.batches)}"

    def _sums(self, plan: StagePlan, index: int) -> Tensor:
        """KL and NLL of one batch, summed over its response tokens, fp64 [2]."""
        hidden = self._response(plan, index)
        heads = (self.student.logits, self.teacher.logits)
        scores = score_tokens(hidden, self.reference[index], self.targets[index], *heads)
        return torch.stack([scores.kl.double().sum(), scores.nll.double().sum()]).cpu()

    def _response(self, plan: StagePlan, index: int) -> Tensor:
        """Final hidden states of one batch's response tokens, [N, H]."""
        batch = self.batches[index]
        request = _request(batch, plan)
        start = self._first_difference(plan)
        trace = self._traces[index] if start is not None else None
        encoded = self._encode(plan, request, trace, start)
        sent = encoded.cache.retained(self._policy(plan))
        parts = [encoded.hidden[:, -1:]] if plan.boundary == "prefill" else []
        fed, valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            resume = _resume(trace, "decode", start)
            self._count(plan, "decode", valid, resume)
            out = self.student.decode(fed, sent, valid, plan=plan, keep_cache=False, resume=resume)
            parts.append(out.hidden)
        return torch.cat(parts, dim=1)[batch.response_mask]

    def _encode(self, plan: StagePlan, request: Request, trace: _Trace | None, start: int | None) -> StagedOutput:
        """Prefill of one batch, or what the base made of it where that is the same."""
        base = self._base
        same = trace is not None and base is not None and plan.prefill == base.prefill
        if same and trace is not None and set(plan.decode) <= set(trace.encoded.cache.blocks):
            return trace.encoded
        resume = _resume(trace, "prefill", start)
        self._count(plan, "prefill", request.valid["prefill"], resume)
        handled, valid = request.tokens["prefill"], request.valid["prefill"]
        return self.student.prefill(handled, valid, plan=plan, resume=resume)

    def _traced(self, plan: StagePlan, batch: Batch) -> _Trace:
        request = _request(batch, plan)
        inputs: dict[Stage, dict[int, Tensor]] = {stage: {} for stage in STAGES}
        observers = {stage: self._keeping(plan, stage, inputs[stage]) for stage in STAGES}
        # A neighbour may put a block back into decode: keep the KV of every block that prefill runs.
        sends = sorted({*plan.decode, *plan.prefill})
        wide = replace(plan, decode=tuple(sends), relation="free", merged={})
        handled, valid = request.tokens["prefill"], request.valid["prefill"]
        self._count(plan, "prefill", valid, None)
        encoded = self.student.prefill(handled, valid, plan=wide, observer=observers["prefill"])
        fed, fed_valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            self._count(plan, "decode", fed_valid, None)
            sent = encoded.cache.retained(self._policy(plan))
            self.student.decode(fed, sent, fed_valid, plan=plan, keep_cache=False, observer=observers["decode"])
        return _Trace(replace(encoded, hidden=encoded.hidden[:, -1:]), inputs)

    def _policy(self, plan: StagePlan) -> KVRetentionPolicy | None:
        return None if self.student.policy is None else self.student.policy.restricted_to(plan)

    def _keeping(self, plan: StagePlan, stage: Stage, inputs: dict[int, Tensor]) -> Observer:
        assert self.stride is not None
        kept = set(plan.blocks(stage)[:: self.stride])

        def observe(block: int, before: Tensor, _: Tensor) -> None:
            if block in kept:
                inputs[block] = before

        return observe

    def _first_difference(self, plan: StagePlan) -> int | None:
        """The first block at which a plan's hidden states may differ from the base's; None where nothing is shared."""
        base = self._base
        if base is None or plan.boundary != base.boundary or plan.untied != base.untied:
            return None
        different = {block for stage in STAGES for block in set(plan.blocks(stage)) ^ set(base.blocks(stage))}
        return min(different, default=plan.model.num_blocks)

    def _count(self, plan: StagePlan, stage: Stage, valid: Tensor, resume: Resume | None) -> None:
        first = 0 if resume is None else resume.block
        self.block_tokens += int(valid.sum()) * sum(block >= first for block in plan.blocks(stage))

    def _stride(self, cache_bytes: int) -> int | None:
        """Keep the input of every so many blocks; None where nothing can be kept."""
        blocks = len(self.student.originals)
        prompt = sum(batch.prompt_ids.numel() for batch in self.batches)
        left = cache_bytes - prompt * blocks * self.student.kv_shape.bytes_per_position
        positions = prompt + sum(batch.response_ids.numel() for batch in self.batches)
        width = self.reference[0].shape[-1] * self.reference[0].element_size()
        hidden = positions * blocks * width
        return None if left <= 0 else max(1, ceil(hidden / left))


def _resume(trace: _Trace | None, stage: Stage, start: int | None) -> Resume | None:
    """The latest kept place at or before `start`, or a closed gate's, whose state is that of the next open one."""
    if trace is None or start is None:
        return None
    inputs = trace.inputs[stage]
    kept = [block for block in inputs if block <= start]
    if not kept:
        return None
    return Resume(max(kept), inputs[max(kept)], trace.encoded.cache.blocks)


def _request(batch: Batch, plan: StagePlan) -> Request:
    return Request.of(*batch.request, plan.boundary)
