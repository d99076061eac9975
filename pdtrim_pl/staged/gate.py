"""One block under a plan: run it, skip it, or project only its keys and values.

Shapes: B batch, T new tokens, N cached entries, H hidden, K key/value heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, RoPE
from pdtrim_pl.plan import STAGES, Stage, StagePlan
from pdtrim_pl.staged.block_call import BlockCall, rope_among
from pdtrim_pl.staged.cache import BlockKV, KVCache, OneBlockCache, Slots, attention_mask
from pdtrim_pl.staged.preallocated import PreallocatedCache, PreallocatedKV

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a block's original index, its input and its output, each [B, T, H]."""


@dataclass(frozen=True, eq=False)
class Resume:
    """Where a pass may start because an earlier one, with the same blocks before it, has been there."""

    block: int
    """Original index of the first block to look at."""
    hidden: Tensor
    """Hidden state that reaches it, [B, T, H]."""
    cached: Mapping[int, BlockKV]
    """Entries after this pass of the blocks before it, where later passes need them."""


@dataclass
class StagePass:
    """One pass of one stage over new tokens. Gates find it with `current_pass`: the model never sees it."""

    stage: Stage
    plan: StagePlan
    tokens: Slots
    """Positions and validity of the new tokens, [B, T]."""
    past: KVCache | PreallocatedCache | None
    """Entries of earlier passes; None for prefill."""
    additive_masks: bool
    """Eager attention adds its mask; fused attention takes a boolean one, or none."""
    recompute: bool = False
    """Gradient checkpointing: keep a block's inputs and outputs only."""
    keep: bool = True
    """Whether later passes need this pass's keys and values."""
    observer: Observer | None = None
    resume: Resume | None = None
    cached: dict[int, BlockKV] = field(default_factory=dict)
    """Filled by the gates: entries of every block after this pass."""
    dtype: torch.dtype | None = None
    """Of a pass that starts at a block: the model's own hidden states'."""
    _slots: dict[int | None, Slots] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = frozenset(self.plan.blocks(self.stage))
        self.last = max(self.runs, default=-1)
        self.projects = frozenset(self.plan.kv_only) if self.stage == "prefill" else frozenset[int]()
        self.sends = frozenset(self.plan.decode)
        self.all_valid = bool(self.tokens.valid.all())
        # Any 4D mask: transformers hands one on as it is, and every gate puts its own in its place.
        self.placeholder = self.tokens.valid[:, None, None]
        if self.resume is not None:
            self.cached.update({i: kv for i, kv in self.resume.cached.items() if i < self.resume.block})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gates that are reached in here, by this thread, belong to this pass."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def slots(self, past: BlockKV | PreallocatedKV | None) -> Slots:
        """Slots of a block's entries after this pass, shared between blocks that share a past."""
        key = None if past is None else id(past.slots)
        if key not in self._slots:
            self._slots[key] = self.tokens if past is None else past.slots.extended(self.tokens)
        return self._slots[key]

    def mask(self, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Mask of the new tokens over `slots`, [B, 1, T, N], built once for equal arguments.

        None where fused attention needs none: a plain causal prompt, or one token that sees everything.
        """
        if window is not None and slots is self.tokens and window >= slots.positions.shape[1]:
            window = None  # a prompt that is no longer than a window has one mask for all blocks, or none
        key = (id(slots), window, dtype if self.additive_masks else torch.bool)
        if key not in self._masks:
            self._masks[key] = self._build(slots, window, dtype)
        return self._masks[key]

    def _build(self, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
        new, entries = self.tokens.positions.shape[1], slots.positions.shape[1]
        plain = not self.additive_masks and self.all_valid and (new == 1 or new == entries)
        if plain and window is None and (slots is self.tokens or bool(slots.valid.all())):
            return None
        seen = attention_mask(self.tokens, slots, window)
        if not self.additive_masks:
            return seen
        lowest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(seen.logical_not_(), lowest)


_CURRENT: ContextVar[StagePass] = ContextVar("current_pass")


def current_pass() -> StagePass:
    """The pass that reaches a gate now, in this thread.

    Raises:
        RuntimeError: the Hugging Face model was called by itself.
    """
    try:
        return _CURRENT.get()
    except LookupError:
        raise RuntimeError(
            "A model whose blocks have gates runs through `StagedCausalLM` only: call its `prefill`, `decode` or "
            "`forward`."
        ) from None


class Gate(nn.Module):
    """Stands in a model's block list for one block and obeys the plan of the pass that reaches it."""

    def __init__(self, block: nn.Module, index: int, window: int | None, architecture: Architecture) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.window = window
        self.architecture = architecture
        self.call = BlockCall.of(block)
        self.project: Callable[[nn.Module, Tensor, RoPE], tuple[Tensor, Tensor]] = architecture.keys_values
        """Makes keys and values of a KV-only block; a strategy that shards weights puts its own in place."""
        self.untied = nn.ModuleDict()
        self.offers: dict[tuple[Stage, int, tuple[int, ...]], nn.Module] = {}
        """Fitted weights that come with merges a search may choose, by stage, block that stays and run: no parameters
        of the model yet."""

    def __getattr__(self, name: str) -> Any:
        """Some models read attributes of their blocks, such as `attention_type`; the block answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def weights(self, stage: Stage, plan: StagePlan) -> nn.Module:
        """The block whose weights `stage` uses under `plan`: those on offer for its run, its own, or the shared one."""
        offered = self._offered(stage, plan)
        if offered is not None:
            return offered
        return self.untied[stage] if self.index in plan.untied[stage] else self.block

    def _offered(self, stage: Stage, plan: StagePlan) -> nn.Module | None:
        merged = plan.merged[stage]
        fits = (weights for (of, into, run), weights in self.offers.items() if of == stage and merged.get(into) == run)
        return next(fits, None)

    def untie(self, stage: Stage) -> None:
        """Give `stage` weights of its own, starting from the shared ones."""
        if stage not in self.untied:
            self.untied[stage] = copy_of(self.block)

    def check_offers(self, plan: StagePlan) -> None:
        """Refuse a plan that would put fitted weights into shared ones that a stage without the merge uses too.

        Raises:
            UserError: with the way out.
        """
        users = (stage for stage in _stages_using(self.index, plan) if self.index not in plan.untied[stage])
        shared = {stage: self._offered(stage, plan) for stage in users}
        if len(set(shared.values())) > 1:
            raise UserError(
                f"Block {self.index} would be merged with `tied: true`, and {' and '.join(shared)} use its shared "
                "weights for different runs. Leave `tied` out, so that the stage gets weights of its own, or merge in "
                "both stages."
            )

    def take_up(self, plan: StagePlan, write: Callable[[nn.Parameter, Tensor], None]) -> None:
        """Untie what `plan` unties, make the weights on offer for its merges those of their stages, end the offers."""
        chosen = {stage: self._offered(stage, plan) for stage in STAGES}
        self.offers.clear()
        targets: dict[int, tuple[nn.Module, nn.Module]] = {}
        for stage in STAGES:
            if self.index in plan.untied[stage]:
                self.untie(stage)
            fitted, weights = chosen[stage], self.weights(stage, plan)
            if fitted is not None:
                targets[id(weights)] = (weights, fitted)  # once, where both stages share them
        for weights, fitted in targets.values():
            for name, parameter in weights.named_parameters():
                write(parameter, fitted.get_parameter(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Offers move with the model, though they are no part of it."""
        super()._apply(fn, recurse)
        for weights in {id(weights): weights for weights in self.offers.values()}.values():
            weights._apply(fn)
        return self

    def forward(self, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Run, project or skip; hidden state in and out, [B, T, H]."""
        current = current_pass()
        if current.resume is not None:
            current.dtype = current.dtype or hidden.dtype
            if self.index < current.resume.block:
                return hidden
            if self.index == current.resume.block:
                hidden = current.resume.hidden
        block = self.weights(current.stage, current.plan)
        if self.index in current.projects:
            keys, values = self.project(block, hidden, rope_among(kwargs))
            current.cached[self.index] = BlockKV(keys, values, current.tokens)
            return hidden
        if self.index not in current.runs:
            return hidden
        past = current.past.blocks[self.index] if current.past is not None else None
        slots = current.slots(past)
        mask = current.mask(slots, self.window, hidden.dtype)
        opened = OneBlockCache if past is None else past.opened
        call = partial(self._run, block, kwargs, current.placeholder, mask, opened)
        if current.recompute and torch.is_grad_enabled():
            out, keys, values = checkpoint(call, hidden, use_reentrant=False)
        else:
            out, keys, values = call(hidden)
        if current.observer is not None:
            current.observer(self.index, hidden, out)
        if current.keep and self.index in current.sends:
            current.cached[self.index] = BlockKV(keys, values, slots)
        # Blocks are fitted in fp32 inside a model of bf16, by a pass that starts there; the last norm takes bf16 only.
        return out.to(current.dtype) if self.index == current.last and current.dtype is not None else out

    def _run(
        self, block: nn.Module, given: dict[str, Any], placeholder: Tensor, mask: Tensor | None,
        opened: Callable[[], OneBlockCache], hidden: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cache = opened()
        out: Tensor = block(hidden, **self.call.arguments(given, placeholder, mask, cache))
        if cache.keys is None or cache.values is None:
            raise UserError(
                f"Block {self.index} of `model`, a {type(block).__name__}, was given its cache as `{self.call.cache}` "
                "and put no keys and values into it."
            )
        return out, cache.keys, cache.values


def _stages_using(index: int, plan: StagePlan) -> tuple[Stage, ...]:
    """Stages that run a block or project its keys and values."""
    return tuple(s for s in STAGES if index in plan.blocks(s) or (s == "prefill" and index in plan.kv_only))


def copy_of(block: nn.Module) -> nn.Module:
    """A block with weights of its own that take gradients."""
    # It reads the model's own configuration, so that a change of attention implementation reaches it.
    configs = [vars(module).get("config") for module in block.modules()]
    shared = {id(config): config for config in configs if config is not None}
    return copy.deepcopy(block, shared).requires_grad_(True)
