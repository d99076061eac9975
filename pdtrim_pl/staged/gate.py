"""One block under a plan: run it, skip it, or project only its keys and values.

Shapes: B batch, T new tokens, N cached entries, H hidden, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from pdtrim_pl.plan import STAGES, Stage, StagePlan, Width
from pdtrim_pl.staged.block_call import BlockCall, rope_among
from pdtrim_pl.staged.cache import BlockKV, KVCache, OneBlockCache, Slots
from pdtrim_pl.staged.compiled import as_it_may, compile_block
from pdtrim_pl.staged.copies import copy_of
from pdtrim_pl.staged.kernel_masks import KERNEL_MASKS
from pdtrim_pl.staged.lora import Adapters, adapted, adapters_of
from pdtrim_pl.staged.masks import additive_mask, fused_mask
from pdtrim_pl.staged.narrowed import Lost, lost_inputs, narrowed
from pdtrim_pl.staged.preallocated import PreallocatedCache, PreallocatedKV
from pdtrim_pl.staged.resume import Resume

Observer = Callable[[int, Tensor, Tensor], None]
"""A function that is called with a block's original index, its input and its output, each [B, T, H]."""
KVListener = Callable[[int, BlockKV], None]
"""A function that is called with a block's original index and its keys and values."""


@dataclass
class StagePass:
    """One pass of one stage over new tokens. Gates read it with `current_pass`; the Hugging Face model does not."""

    stage: Stage
    plan: StagePlan
    tokens: Slots
    """Positions and validity of the new tokens, [B, T]."""
    past: KVCache | PreallocatedCache | None
    """Keys and values of earlier passes; None for prefill."""
    additive_masks: bool
    """True for eager attention, which adds its mask to the scores. Fused attention takes a boolean mask or none."""
    recompute: bool = False
    """Gradient checkpointing: keep only the input and output of each block, and recompute the rest in backward."""
    keep: bool = True
    """Whether later passes need the keys and values of this pass."""
    observer: Observer | None = None
    """Called after every block that ran."""
    resume: Resume | None = None
    """The block to start at; None starts at the first block."""
    on_kv: KVListener | None = None
    """Called with the keys and values of every block as soon as they are there."""
    cached: dict[int, BlockKV] = field(default_factory=dict)
    """Original index -> keys and values after this pass. The gates fill it."""
    dtype: torch.dtype | None = None
    """Element type of the model's hidden states. The gates set it if the pass starts in the middle (`resume`)."""
    attention: str = "sdpa"
    """The model's attention implementation."""
    _slots: dict[int | None, Slots] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = frozenset(self.plan.blocks(self.stage))
        self.last = max(self.runs, default=-1)
        self.projects = frozenset(self.plan.kv_only) if self.stage == "prefill" else frozenset[int]()
        self.sends = frozenset(self.plan.decode)
        # Any 4D mask serves: transformers passes it on unchanged, and every gate replaces it with its own mask.
        self.placeholder = self.tokens.valid[:, None, None]
        if self.resume is not None:
            self.cached.update({i: kv for i, kv in self.resume.cached.items() if i < self.resume.block})

    def store(self, index: int, kv: BlockKV) -> None:
        """Store keys and values of a block after this pass."""
        self.cached[index] = kv
        if self.on_kv is not None:
            self.on_kv(index, kv)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make this the current pass of the thread: every gate that runs inside the `with` block obeys it."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def slots(self, past: BlockKV | PreallocatedKV | None) -> Slots:
        """Slots of a block's entries after this pass. Blocks whose past has the same slots get the same object."""
        key = None if past is None else id(past.slots)
        if key not in self._slots:
            self._slots[key] = self.tokens if past is None else past.slots.extended(self.tokens)
        return self._slots[key]

    def mask(self, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Attention mask of the new tokens over `slots`, [B, 1, T, N]. Equal arguments get the same mask.

        Fused attention gets a `LowerRight` or None where rows are whole (see `fused_mask`).
        """
        if window is not None and slots is self.tokens and window >= slots.positions.shape[1]:
            window = None  # the prompt fits into the window, so all blocks can share one mask
        key = (id(slots), window, dtype if self.additive_masks else torch.bool)
        if key not in self._masks:
            build = additive_mask if self.additive_masks else KERNEL_MASKS.get(self.attention, fused_mask)
            self._masks[key] = build(self.tokens, slots, window, dtype)
        return self._masks[key]


_CURRENT: ContextVar[StagePass] = ContextVar("current_pass")


def current_pass() -> StagePass:
    """The pass that runs now in this thread.

    Raises:
        RuntimeError: no pass runs: the Hugging Face model was called directly.
    """
    try:
        return _CURRENT.get()
    except LookupError:
        raise RuntimeError(
            "A model whose blocks have gates runs through `StagedCausalLM` only: call its `prefill`, `decode` or "
            "`forward`."
        ) from None


class Gate(nn.Module):
    """Replaces one block in a model's block list, and runs, skips or projects it as the current pass demands."""

    def __init__(self, block: nn.Module, index: int, window: int | None, architecture: Architecture) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.window = window
        self.architecture = architecture
        self.call = BlockCall.of(block)
        self.project: Callable[[nn.Module, Tensor, RoPE], tuple[Tensor, Tensor]] = architecture.keys_values
        """Projects the keys and values of a KV-only block. A strategy that shards weights replaces this function."""
        self.compiled = False
        """Whether the weights that train are compiled blocks."""
        self.untied = nn.ModuleDict()
        """Stage -> the block with weights of its own for that stage."""
        self.adapters = nn.ModuleDict()
        """Stage, or `both` -> adapters of the block; empty unless adapters train."""
        self.offers: dict[tuple[Stage, int, tuple[int, ...]], nn.Module] = {}
        """Fitted weights for merges that a search may choose; the key is stage, block that stays and run. They are not
        parameters of the model."""
        self.refit_offers: dict[tuple[Stage, Width], nn.Module] = {}
        """This block with a refitted layer, for widths that a search may choose. All other weights are the model's."""

    def __getattr__(self, name: str) -> Any:
        """Look up missing attributes on the block: some models read them there, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def weights(self, stage: Stage, plan: StagePlan) -> nn.Module:
        """The block whose weights `stage` uses under `plan`.

        An offer that fits a merge or the width of the plan comes first, then weights of the stage's own, then the
        shared weights. A search tries plans whose own weights are not there yet: they would begin as the shared ones.
        """
        offered = self._offered(stage, plan)
        if offered is None:
            offered = self._offered_width(stage, plan)
        if offered is not None:
            return offered
        own = self.index in plan.untied[stage] and stage in self.untied
        return self.untied[stage] if own else self.block

    def _offered(self, stage: Stage, plan: StagePlan) -> nn.Module | None:
        merged = plan.merged[stage]
        fits = (weights for (of, into, run), weights in self.offers.items() if of == stage and merged.get(into) == run)
        return next(fits, None)

    def _offered_width(self, stage: Stage, plan: StagePlan) -> nn.Module | None:
        width = plan.widths[stage].get(self.index) if self.refit_offers else None
        return None if width is None else self.refit_offers.get((stage, width))

    def untie(self, stage: Stage) -> None:
        """Give `stage` weights of its own. They start as a copy of the shared ones."""
        if stage not in self.untied:
            self.untied[stage] = copy_of(self.block)
            if self.compiled:
                compile_block(self.untied[stage])

    def compile_weights(self) -> None:
        """Compile the block, and those that stages will have of their own."""
        self.compiled = True
        for block in (self.block, *self.untied.values()):
            compile_block(block)

    def check_offers(self, plan: StagePlan) -> None:
        """Refuse a plan that would write fitted weights into shared weights that are also used without the merge.

        Raises:
            UserError: both stages use the shared weights of this block, but for different runs.
        """
        users = (stage for stage in _stages_using(self.index, plan) if self.index not in plan.untied[stage])
        shared = {stage: self._offered(stage, plan) for stage in users}
        if len(set(shared.values())) > 1:
            raise UserError(
                f"Block {self.index} would be merged with `tied: true`, and {' and '.join(shared)} use its shared "
                "weights for different runs. Leave `tied` out, so that the stage gets weights of its own, or merge in "
                "both stages."
            )

    def apply_plan(self, plan: StagePlan, write: Callable[[nn.Parameter, Tensor], None]) -> None:
        """Create the untied weights of `plan`, write the offers that fit its merges into the model, drop all offers.

        Args:
            plan: what each stage runs from now on.
            write: writes a value into a parameter.
        """
        chosen = {stage: self._offered(stage, plan) for stage in STAGES}
        self.offers.clear()
        self.refit_offers.clear()
        targets: dict[int, tuple[nn.Module, nn.Module]] = {}
        for stage in STAGES:
            if self.index in plan.untied[stage]:
                self.untie(stage)
            fitted, weights = chosen[stage], self.weights(stage, plan)
            if fitted is not None:
                targets[id(weights)] = (weights, fitted)  # one entry if both stages share the weights
        for weights, fitted in targets.values():
            for name, parameter in weights.named_parameters():
                write(parameter, fitted.get_parameter(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Move and cast the offers too: they are not submodules."""
        super()._apply(fn, recurse)
        for weights in {id(w): w for w in (*self.offers.values(), *self.refit_offers.values())}.values():
            weights._apply(fn)
        return self

    def forward(self, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Run the block, project its keys and values, or skip it; hidden state in and out, [B, T, H]."""
        current = current_pass()
        if current.resume is not None:
            current.dtype = current.dtype or hidden.dtype
            if self.index < current.resume.block:
                return hidden
            if self.index == current.resume.block:
                hidden = current.resume.hidden
        block = self.weights(current.stage, current.plan)
        adapters = adapters_of(self.adapters, current.stage)
        if self.index in current.projects:
            with adapted(block, adapters):
                keys, values = self.project(block, hidden, rope_among(kwargs))
            current.store(self.index, BlockKV(keys, values, current.tokens))
            return hidden
        if self.index not in current.runs:
            return hidden
        past = current.past.blocks[self.index] if current.past is not None else None
        slots = current.slots(past)
        mask = current.mask(slots, self.window, hidden.dtype)
        new_cache = OneBlockCache if past is None else past.attention_cache
        width = current.plan.widths[current.stage].get(self.index)
        lost = lost_inputs(block, self.architecture.cuts, current.plan.model.sizes, width)
        call = partial(self._run, block, kwargs, current.placeholder, mask, new_cache, lost, adapters)
        if current.recompute and torch.is_grad_enabled():
            out, keys, values = checkpoint(call, hidden, use_reentrant=False)
        else:
            out, keys, values = call(hidden)
        if current.observer is not None:
            current.observer(self.index, hidden, out)
        if current.keep and self.index in current.sends:
            current.store(self.index, BlockKV(keys, values, slots))
        # A local fit runs fp32 blocks inside a bf16 model, in a pass that starts at them. The final norm needs bf16.
        return out.to(current.dtype) if self.index == current.last and current.dtype is not None else out

    def _run(
        self, block: nn.Module, given: dict[str, Any], placeholder: Tensor, mask: Tensor | None,
        new_cache: Callable[[], OneBlockCache], lost: Lost, adapters: Adapters, hidden: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cache = new_cache()  # made here, so that a recomputed block starts from the same past
        with narrowed(block, lost), adapted(block, adapters), as_it_may(block):  # here, as a block may be recomputed
            out: Tensor = block(hidden, **self.call.arguments(given, placeholder, mask, cache))
        if cache.keys is None or cache.values is None:
            raise UserError(
                f"Block {self.index} of `model`, a {type(block).__name__}, was given its cache as `{self.call.cache}` "
                "and put no keys and values into it."
            )
        return out, cache.keys, cache.values


def _stages_using(index: int, plan: StagePlan) -> tuple[Stage, ...]:
    """Stages that run the block at `index` or project its keys and values."""
    return tuple(s for s in STAGES if index in plan.blocks(s) or (s == "prefill" and index in plan.kv_only))
