"""A Hugging Face causal language model under a stage plan and a KV retention policy.

Shapes: B batch, P prompt tokens, R response tokens, T new tokens, H hidden, V vocabulary.
Prompts are padded on the left, responses on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pdtrim_pl.compat import attention_of
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Stage, StagePlan
from pdtrim_pl.staged.below import Below
from pdtrim_pl.staged.cache import KVCache, Slots
from pdtrim_pl.staged.gate import KVListener, Observer, Resume, StagePass
from pdtrim_pl.staged.preallocated import PreallocatedCache
from pdtrim_pl.staged.request import Request, as_bool, never_empty
from pdtrim_pl.staged.rows import RowCounts, Rows
from pdtrim_pl.staged.structure import GatedCausalLM

T = TypeVar("T")


@dataclass(frozen=True)
class StagedOutput:
    """Final hidden states [B, R, H]; entry i predicts response token i. Turn them into logits chunk by chunk."""

    hidden: Tensor
    cache: KVCache
    """Of `prefill`: the whole prompt. Of `decode`: the entries after its tokens. Of `forward`: what prefill sent."""


class StagedCausalLM(GatedCausalLM):
    """One model that runs both stages. The plan says what each stage runs, the policy what prefill sends to decode.

    `prefill` and `decode` run one stage. `forward` runs both, for a known response. Generation token by token is in
    `pdtrim_pl.staged.decoding`. For the constructor's arguments see `GatedCausalLM`.
    """

    def prefill(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, plan: StagePlan | None = None,
        observer: Observer | None = None, resume: Resume | None = None,
        on_kv: KVListener | None = None, rows: Rows | None = None,
    ) -> StagedOutput:  # fmt: skip
        """Run the prefill stage on the positions that it handles.

        Under `boundary: decode` pass the prompt without its last token; an empty prompt is allowed.

        Args:
            prompt_ids: token ids, [B, P], padded on the left.
            prompt_mask: True on real tokens, [B, P]; all real by default.
            plan: run under this plan instead of `self.plan`.
            observer: called after every block that ran.
            resume: start at a block that an earlier pass over the same tokens has reached.
            on_kv: called with index, keys and values of every block of D, in order, as soon as they are there.
            rows: what the host knows of the mask.

        Returns:
            Hidden states [B, P, H], and keys and values of every block of D.
        """
        prompt_ids, valid = never_empty(prompt_ids, as_bool(prompt_ids, prompt_mask))
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        tokens = Slots(positions, valid, rows)
        current = self._pass("prefill", tokens, None, plan, observer, resume, keep=True, on_kv=on_kv)
        hidden = self._run(prompt_ids, current)
        return StagedOutput(hidden, KVCache(current.cached, valid.sum(dim=1)))

    def decode(
        self, token_ids: Tensor, cache: KVCache, mask: Tensor | None = None, *, plan: StagePlan | None = None,
        observer: Observer | None = None, keep_cache: bool = True, resume: Resume | None = None,
        rows: Rows | None = None,
    ) -> StagedOutput:  # fmt: skip
        """Run the decode stage on one or more tokens at their true positions, against `cache`.

        Args:
            token_ids: token ids, [B, T], padded on the right.
            cache: keys and values that prefill sent and decode added since.
            mask: True on real tokens, [B, T]; all real by default.
            plan: run under this plan instead of `self.plan`.
            observer: called after every block that ran.
            keep_cache: whether to return a cache with the new tokens; if False, `cache` itself is returned.
            resume: start at a block that an earlier pass over the same tokens has reached.
            rows: what the host knows of the mask and of the positions.

        Returns:
            Hidden states [B, T, H] and the cache after these tokens.
        """
        valid = as_bool(token_ids, mask)
        positions = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        current = self._pass("decode", Slots(positions, valid, rows), cache, plan, observer, resume, keep=keep_cache)
        hidden = self._run(token_ids, current)
        grown = KVCache(current.cached, cache.lengths + valid.sum(dim=1)) if keep_cache else cache
        return StagedOutput(hidden, grown)

    def step(self, token_ids: Tensor, cache: PreallocatedCache, *, plan: StagePlan | None = None) -> Tensor:
        """Run the decode stage on one token of every row. Its keys and values are written into `cache` in place.

        Args:
            token_ids: token ids, [B].
            cache: keys and values that prefill sent and decode added since, with room for one more token.
            plan: run under this plan instead of `self.plan`.

        Returns:
            Hidden states, [B, H].
        """
        tokens = cache.next_slots()
        current = self._pass("decode", tokens, cache, plan, None, None, keep=False)
        hidden = self._run(token_ids[:, None], current)
        cache.advance()
        return hidden[:, -1]

    def forward(
        self, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None = None,
        response_mask: Tensor | None = None, *, plan: StagePlan | None = None,
        policy: KVRetentionPolicy | None = None, observers: dict[Stage, Observer] | None = None,
        keep_cache: bool = True, counts: RowCounts | None = None, below: Below | None = None,
    ) -> StagedOutput:  # fmt: skip
        """The teacher-forced pass: prefill the prompt, apply the policy, decode every response token in parallel.

        Args:
            prompt_ids: [B, P], padded on the left.
            response_ids: [B, R], padded on the right.
            prompt_mask: True on real tokens, [B, P].
            response_mask: True on real tokens, [B, R].
            plan: run under this plan and under `policy`, instead of `self.plan` and `self.policy`.
            policy: the policy to run under, if `plan` is given; None sends everything.
            observers: per stage, called after every block that ran.
            keep_cache: whether to return the cache. If it is not needed, and both stages are one model that gets
                everything, one pass over prompt and response computes the same for less.
            counts: the number of real tokens in each row of the masks. If it is given, the host does not wait for the
                device to read them.
            below: shares the first blocks with the pass of another model; not with `observers`.

        Returns:
            Hidden states [B, R, H] that predict each response token, and the cache that prefill sent; an empty cache if
            it is not kept.

        Raises:
            UserError: prompt and response exceed the model's context.
        """
        if plan is None:
            plan, policy = self.plan, self.policy
        self.check_length(prompt_ids, prompt_mask, response_ids.shape[1], response_mask, counts)
        given = (prompt_ids, response_ids, prompt_mask, response_mask)
        at_once = self._can_run_at_once(plan, policy) and not keep_cache and not observers
        if at_once if below is None else below.at_once:
            return self._at_once(Request.of(*given, "prefill", counts), prompt_ids.shape[1], plan, below)
        watch = observers or ({} if below is None else below.observers)
        resumes = {} if below is None else below.resumes
        request = Request.of(*given, plan.boundary, counts)
        handled, valid, rows = request.tokens["prefill"], request.valid["prefill"], request.rows["prefill"]
        encoded = self.prefill(
            handled, valid, plan=plan, observer=watch.get("prefill"), rows=rows, resume=resumes.get("prefill")
        )
        if below is not None and not below.filled:
            below.cached = encoded.cache.blocks
        sent = encoded.cache.retained(policy)
        hidden = self.respond(
            request, encoded.hidden, sent, plan=plan, observer=watch.get("decode"), resume=resumes.get("decode")
        )
        if below is not None:
            below.filled = True
        return StagedOutput(hidden, sent)

    @property
    def runs_at_once(self) -> bool:
        """Whether one pass over prompt and response computes what the two stages do, if no cache is kept."""
        return self._can_run_at_once(self.plan, self.policy)

    def _can_run_at_once(self, plan: StagePlan, policy: KVRetentionPolicy | None) -> bool:
        alike = plan.stages_are_alike and (self.lora is None or self.lora.tied)
        return alike and (policy is None or policy.sends_everything)

    def _at_once(self, request: Request, prompt: int, plan: StagePlan, below: Below | None) -> StagedOutput:
        """The teacher-forced pass of a model that is the same in both stages, as one causal pass."""
        tokens, valid = (torch.cat([part[stage] for stage in STAGES], 1) for part in (request.tokens, request.valid))
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        joined = Slots(positions, valid, request.joined_rows)
        observer = None if below is None else below.observers.get("prefill")
        resume = None if below is None else below.resumes.get("prefill")
        current = self._pass("prefill", joined, None, plan, observer, resume, keep=False)
        hidden = self._run(tokens, current)[:, prompt - 1 :]
        if below is not None:
            below.filled = True
        return StagedOutput(hidden, KVCache({}, valid.sum(dim=1)))

    def respond(
        self, request: Request, encoded: Tensor, sent: KVCache, *, plan: StagePlan | None = None,
        observer: Observer | None = None, resume: Resume | None = None,
    ) -> Tensor:  # fmt: skip
        """Decode all tokens of a known response in parallel.

        Args:
            request: prompts and responses.
            encoded: hidden states of prefill, at least of the last position, [B, P, H].
            sent: keys and values that decode was sent.
            plan: run under this plan instead of `self.plan`.
            observer: called after every block that ran.
            resume: see `decode`.

        Returns:
            Hidden states that predict each response token, [B, R, H]. The first is prefill's under `boundary: prefill`.
        """
        parts = [encoded[:, -1:]] if (plan or self.plan).boundary == "prefill" else []
        fed, valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            out = self.decode(
                fed, sent, valid, plan=plan, observer=observer, keep_cache=False, resume=resume,
                rows=request.rows["decode"],
            )  # fmt: skip
            parts.append(out.hidden)
        return torch.cat(parts, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's head on final hidden states, [..., H] -> [..., V]."""
        return self.architecture.logits(self.model, hidden)

    def compared_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the first `compared_tokens` ids, for a comparison of two models."""
        return self.logits(hidden)[..., : self.compared_tokens]

    def gathered_logits(self, hidden: Tensor) -> Tensor:
        """The same while the head's weights are whole: within `at_head` and `whole_head`."""
        return self.architecture.logits(self.model, hidden)[..., : self.compared_tokens]

    def at_head(self, hidden: Tensor, work: Callable[[Tensor], T]) -> T:
        """Work on final hidden states, with gradients, while the head's weights are whole. May be a collective.

        Args:
            hidden: final hidden states, [N, H].
            work: gets them, and returns tensors.
        """
        return work(hidden)

    def check_length(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None, response: int, response_mask: Tensor | None = None,
        counts: RowCounts | None = None,
    ) -> None:  # fmt: skip
        """Check that prompt and response fit into the model's context.

        Args:
            prompt_ids: token ids, [B, P].
            prompt_mask: True on real tokens, [B, P].
            response: number of tokens of the longest response.
            response_mask: True on real tokens, [B, R], if the response is known.
            counts: numbers of real tokens, if the host knows them.

        Raises:
            UserError: they do not fit.
        """
        context = usable_context(self.model.config.to_dict())
        if prompt_ids.shape[1] + response <= context:
            return
        if counts is None:
            prompts = as_bool(prompt_ids, prompt_mask).sum(dim=1)  # without padding
            responses = response if response_mask is None else response_mask.sum(dim=1)
            tokens = int((prompts + responses).max())
        else:
            tokens = counts.longest
        if tokens > context:
            raise UserError(
                f"Prompt and response take {tokens} tokens, and the context of `model` is {context}. Shorten the "
                "prompt, or lower `max_new_tokens` (`lengths.max_length` of the data)."
            )

    # Mechanics

    def _pass(
        self, stage: Stage, tokens: Slots, past: KVCache | PreallocatedCache | None, plan: StagePlan | None,
        observer: Observer | None, resume: Resume | None, *, keep: bool,
        on_kv: KVListener | None = None,
    ) -> StagePass:  # fmt: skip
        attention = attention_of(self.model)
        recompute = self.gradient_checkpointing and self.training
        return StagePass(
            stage, plan or self.plan, tokens, past, attention == "eager", recompute, keep, observer, resume, on_kv,
            attention=attention,
        )  # fmt: skip

    def _run(self, token_ids: Tensor, current: StagePass) -> Tensor:
        mask = current.placeholder
        by_kind = {"full_attention": mask, "sliding_attention": mask}
        with current.running():
            out = self.model.base_model(
                input_ids=token_ids,
                position_ids=current.tokens.positions,
                attention_mask=by_kind if self.architecture.mask_by_kind else mask,
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden
