"""A Hugging Face causal language model under a stage plan and a KV retention policy.

Shapes: B batch, P prompt tokens, R response tokens, T new tokens, H hidden, V vocabulary.
Prompts are padded on the left, responses on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim_pl.compat import attention_of
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.adapters import class_path_of
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, KVShape, ModelRef, Stage, StagePlan
from pdtrim_pl.staged.cache import KVCache, Slots
from pdtrim_pl.staged.decoding import PickToken, decode_stream, greedy, until_stopped
from pdtrim_pl.staged.fitted import FittedRun
from pdtrim_pl.staged.gate import Gate, Observer, Resume, StagePass
from pdtrim_pl.staged.request import Request, as_bool, never_empty

WriteWeight = Callable[[nn.Parameter, Tensor], None]
"""Puts a value into a parameter that trains."""


@dataclass(frozen=True)
class StagedOutput:
    """Final hidden states [B, R, H]; entry i predicts response token i. Turn them into logits chunk by chunk."""

    hidden: Tensor
    cache: KVCache
    """The prompt's cache as it was sent."""


class StagedCausalLM(nn.Module):
    """One set of weights, two stages. The plan and the policy say what each stage runs and what crosses between them.

    Blocks are never deleted here: every block sits behind a gate that runs it, skips it or projects its KV.

    Args:
        model: a decoder-only Hugging Face model; its block list is replaced by gates, in place.
        plan: what each stage runs. The full plan by default.
        policy: what crosses the boundary. Everything by default.
        originals: original indices of the blocks that `model` holds, where it holds only some of them.
        architecture: adapter of the model's family, where the package has none.

    Raises:
        UserError: no adapter for the family, or an attention implementation that cannot take the contract's masks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: StagePlan | None = None,
        policy: KVRetentionPolicy | None = None,
        *,
        originals: Sequence[int] | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture or architecture_of(model.config)
        blocks = self.architecture.blocks(model)
        self.originals = tuple(originals if originals is not None else range(len(blocks)))
        assert len(self.originals) == len(blocks)
        _check_attention(model, self.architecture)
        for position, (index, block) in enumerate(zip(self.originals, blocks, strict=True)):
            blocks[position] = Gate(block, index, self.architecture.window(model.config, position), self.architecture)
        self.model = model
        self.gradient_checkpointing = False
        self.plan = StagePlan.full(reference_to(model)) if originals is None or plan is None else plan
        self.policy: KVRetentionPolicy | None = None
        self.apply_plan(plan or self.plan)
        self.apply_policy(policy)

    # Structure

    @property
    def gates(self) -> dict[int, Gate]:
        """Original block index -> its gate."""
        gates = self.architecture.blocks(self.model)
        return {index: gate for index, gate in zip(self.originals, gates, strict=True) if isinstance(gate, Gate)}

    @property
    def untied(self) -> dict[Stage, tuple[int, ...]]:
        """Per stage, blocks with weights of their own here, also those that have left the plan since."""
        return {stage: tuple(i for i, gate in self.gates.items() if stage in gate.untied) for stage in STAGES}

    @property
    def kv_shape(self) -> KVShape:
        """Shape of one block's KV per position, in the model's own element type."""
        return kv_shape_of(self.model)

    def apply_plan(self, plan: StagePlan, write: WriteWeight | None = None) -> None:
        """Run under `plan` from now on; creates the untied weights it names and narrows the policy to its D.

        Fitted weights on offer for the merges of `plan` become those of their stages, and all offers end.

        Args:
            plan: what each stage runs.
            write: how fitted weights get into parameters, where an engine keeps copies of them.

        Raises:
            UserError: the plan is for a model of another type or with another number of blocks, or it merges into
                shared weights that a stage without that merge uses too.
        """
        if plan.model.model_type != self.model.config.model_type:
            raise UserError(
                f"The stage plan is for a model of type {plan.model.model_type!r} ({plan.model.name_or_path}), and "
                f"`model` is of type {self.model.config.model_type!r}. Use the plan of this model."
            )
        whole = self.originals == tuple(range(len(self.originals)))
        known = self.plan.model.num_blocks
        if plan.model.num_blocks != known or (whole and known < len(self.originals)):
            raise UserError(
                f"The stage plan is for a model of {plan.model.num_blocks} blocks, and `model` has "
                f"{len(self.originals)}. Use the plan of this model, or name the plan's model in `model`."
            )
        for gate in self.gates.values():
            gate.check_offers(plan)
        adapter = class_path_of(self.architecture, plan.model.model_type)
        self.plan = plan = replace(plan, model=replace(plan.model, architecture=adapter))
        for gate in self.gates.values():
            gate.take_up(plan, write or _overwrite)
        if self.policy is not None:
            self.apply_policy(self.policy.restricted_to(plan))

    def apply_policy(self, policy: KVRetentionPolicy | None) -> None:
        """Send what `policy` says from now on; None sends everything.

        Raises:
            UserError: the policy is for another plan, or its KV has another shape than this model's.
        """
        if policy is not None:
            policy.check(self.plan)
            ours, theirs = self.kv_shape, policy.kv
            if (ours.num_key_value_heads, ours.head_dim) != (theirs.num_key_value_heads, theirs.head_dim):
                raise UserError(
                    f"`kv` of the policy is {theirs.num_key_value_heads} heads of {theirs.head_dim}, and `model` has "
                    f"{ours.num_key_value_heads} of {ours.head_dim}. Use the policy of this model."
                )
        self.policy = policy

    def offer(self, fitted: Iterable[FittedRun]) -> None:
        """Let plans that make these merges run with the fitted weights, until a plan is applied or they are withdrawn.

        They are no parameters of this model: not saved, not trained, but moved with it.
        """
        gates = self.gates
        for run in fitted:
            assert run.move.into is not None
            for index, block in run.blocks.items():
                weights = block.to(self.model.device).eval().requires_grad_(False)
                for stage, merged in run.stands_for.items():
                    gates[index].offers[stage, run.move.into, merged] = weights

    def withdraw(self) -> None:
        """End all offers."""
        for gate in self.gates.values():
            gate.offers.clear()

    def freeze_unused(self) -> None:
        """Let only weights that some stage of the plan uses take gradients."""
        for index, gate in self.gates.items():
            users = [gate.weights(stage, self.plan) for stage in STAGES if index in self.plan.blocks(stage)]
            if index in self.plan.kv_only:
                block = gate.weights("prefill", self.plan)
                users += [block.get_submodule(name) for name in self.architecture.kv_modules]
            used = {id(parameter) for user in users for parameter in user.parameters()}
            for parameter in gate.parameters():
                parameter.requires_grad_(id(parameter) in used)

    def freeze_embeddings(self) -> None:
        """Let token embeddings and head take no gradients, whatever the plan."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            module.requires_grad_(False)

    def rebuild_rope(self) -> None:
        """Make the RoPE tables anew, in fp32, where a loader made them in the weights' element type."""
        base = self.model.base_model
        for name, child in list(base.named_children()):
            table = next(child.buffers(recurse=False), None)
            if table is not None and next(child.parameters(), None) is None:
                setattr(base, name, type(child)(base.config).to(table.device))

    # The contract

    def prefill(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, plan: StagePlan | None = None,
        observer: Observer | None = None, resume: Resume | None = None,
    ) -> StagedOutput:  # fmt: skip
        """The prefill node's work on the positions it handles: hidden states [B, P, H] and KV for every block of D.

        Under `boundary: decode` pass the prompt without its last token; an empty prompt is allowed.

        Args:
            prompt_ids: token ids, [B, P], padded on the left.
            prompt_mask: True on real tokens, [B, P]; all real by default.
            plan: run under another plan than `self.plan`.
            observer: called after every block that ran.
            resume: start at a block that an earlier pass over the same tokens has reached.
        """
        prompt_ids, valid = never_empty(prompt_ids, as_bool(prompt_ids, prompt_mask))
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        current = self._pass("prefill", Slots(positions, valid), None, plan, observer, resume, keep=True)
        hidden = self._run(prompt_ids, current)
        return StagedOutput(hidden, KVCache(current.cached, valid.sum(dim=1)))

    def decode(
        self, token_ids: Tensor, cache: KVCache, mask: Tensor | None = None, *, plan: StagePlan | None = None,
        observer: Observer | None = None, keep_cache: bool = True, resume: Resume | None = None,
    ) -> StagedOutput:  # fmt: skip
        """The decode node's work on one or more tokens at their true positions, against `cache`.

        Args:
            token_ids: token ids, [B, T], padded on the right.
            cache: what prefill sent, with what decode added since.
            mask: True on real tokens, [B, T]; all real by default.
            plan: run under another plan than `self.plan`.
            observer: called after every block that ran.
            keep_cache: whether the returned cache holds the new tokens too (no use in a teacher-forced pass).
            resume: start at a block that an earlier pass over the same tokens has reached.

        Returns:
            Hidden states [B, T, H] and the cache after these tokens.
        """
        valid = as_bool(token_ids, mask)
        positions = cache.lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        current = self._pass("decode", Slots(positions, valid), cache, plan, observer, resume, keep=keep_cache)
        hidden = self._run(token_ids, current)
        grown = KVCache(current.cached, cache.lengths + valid.sum(dim=1)) if keep_cache else cache
        return StagedOutput(hidden, grown)

    def forward(
        self, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None = None,
        response_mask: Tensor | None = None, *, plan: StagePlan | None = None,
        policy: KVRetentionPolicy | None = None, observers: dict[Stage, Observer] | None = None,
    ) -> StagedOutput:  # fmt: skip
        """The teacher-forced pass: prefill the prompt, apply the policy, decode every response token in parallel.

        Args:
            prompt_ids: [B, P], padded on the left.
            response_ids: [B, R], padded on the right.
            prompt_mask: True on real tokens, [B, P].
            response_mask: True on real tokens, [B, R].
            plan: run under another plan than `self.plan`; `policy` then counts as given, None sending everything.
            policy: with `plan`, the policy to run under.
            observers: per stage, called after every block that ran.

        Returns:
            Hidden states [B, R, H] that predict each response token, and the cache as sent.
        """
        if plan is None:
            plan, policy = self.plan, self.policy
        self._check_length(prompt_ids, prompt_mask, response_ids.shape[1], response_mask)
        watch = observers or {}
        request = Request.of(prompt_ids, response_ids, prompt_mask, response_mask, plan.boundary)
        handled, fed = request.tokens["prefill"], request.tokens["decode"]
        valid = request.valid
        encoded = self.prefill(handled, valid["prefill"], plan=plan, observer=watch.get("prefill"))
        sent = encoded.cache.retained(policy)
        parts = [encoded.hidden[:, -1:]] if plan.boundary == "prefill" else []
        if fed.shape[1]:
            out = self.decode(fed, sent, valid["decode"], plan=plan, observer=watch.get("decode"), keep_cache=False)
            parts.append(out.hidden)
        return StagedOutput(torch.cat(parts, dim=1), sent)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's head on final hidden states, [..., H] -> [..., V]."""
        return self.architecture.logits(self.model, hidden)

    @torch.no_grad()
    def stream(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, max_new_tokens: int, pick: PickToken = greedy
    ) -> Iterator[Tensor]:
        """Generate token by token; yields ids [B] as they come. Greedy by default."""
        if max_new_tokens < 1:
            raise UserError(f"`max_new_tokens` is {max_new_tokens}: give at least 1.")
        self._check_length(prompt_ids, prompt_mask, max_new_tokens)
        valid = as_bool(prompt_ids, prompt_mask)
        handed = prompt_ids.shape[1] - (self.plan.boundary == "decode")
        encoded = self.prefill(prompt_ids[:, :handed], valid[:, :handed])
        first = pick(self.logits(encoded.hidden[:, -1])) if self.plan.boundary == "prefill" else None
        cache = encoded.cache.retained(self.policy)
        yield from decode_stream(
            self, cache, first=first, last_prompt=prompt_ids[:, -1], max_new_tokens=max_new_tokens, pick=pick
        )

    def generate(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, max_new_tokens: int,
        stop_ids: Collection[int] = (), pick: PickToken = greedy,
    ) -> Tensor:  # fmt: skip
        """Generate a batch of responses, [B, up to max_new_tokens].

        A row that has produced one of `stop_ids` repeats it until every row is done.
        """
        stream = self.stream(prompt_ids, prompt_mask, max_new_tokens=max_new_tokens, pick=pick)
        return torch.stack(list(until_stopped(stream, stop_ids)), dim=1)

    # Mechanics

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StagedCausalLM:
        """Move and cast weights, but never cast buffers: RoPE frequencies in bf16 are wrong at far positions."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != exact[name].dtype:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, exact[name].to(buffer.device))
        return self

    def _pass(
        self, stage: Stage, tokens: Slots, past: KVCache | None, plan: StagePlan | None, observer: Observer | None,
        resume: Resume | None, *, keep: bool,
    ) -> StagePass:  # fmt: skip
        additive = attention_of(self.model) == "eager"
        recompute = self.gradient_checkpointing and self.training
        return StagePass(stage, plan or self.plan, tokens, past, additive, recompute, keep, observer, resume)

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

    def _check_length(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None, response: int, response_mask: Tensor | None = None
    ) -> None:
        context = usable_context(self.model.config.to_dict())
        if prompt_ids.shape[1] + response <= context:
            return
        prompts = as_bool(prompt_ids, prompt_mask).sum(dim=1)  # padding counts for nothing
        responses = response if response_mask is None else response_mask.sum(dim=1)
        tokens = int((prompts + responses).max())
        if tokens > context:
            raise UserError(
                f"Prompt and response take {tokens} tokens, and the context of `model` is {context}. Shorten the "
                "prompt, or lower `max_new_tokens` (`lengths.max_length` of the data)."
            )


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def reference_to(model: PreTrainedModel, name_or_path: str | None = None) -> ModelRef:
    """How plans name this model."""
    config = model.config
    return ModelRef(name_or_path or str(model.name_or_path), config.model_type, config.num_hidden_layers)


def kv_shape_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> KVShape:
    """Heads, head size and element type of a model's KV cache."""
    config = model.config.to_dict()
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    return KVShape(kv_heads, size, str(dtype or model.dtype).removeprefix("torch."))


def _check_attention(model: PreTrainedModel, architecture: Architecture) -> None:
    chosen = attention_of(model)
    if chosen not in ("sdpa", "eager"):
        raise UserError(
            f"`attn_implementation` is {chosen!r}, which takes no mask of the contract's kind (cached entries at "
            "chosen positions). Load the model with `attn_implementation: sdpa` or `eager`."
        )
    if chosen == "sdpa" and not architecture.supports_sdpa(model.config):
        raise UserError(
            f"`attn_implementation: sdpa` cannot compute {model.config.model_type} with soft-capped attention scores. "
            "Load the model with `attn_implementation: eager`."
        )
