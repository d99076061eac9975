"""One block under a plan: run it, skip it, or project only its keys and values.

Shapes: B batch, T new tokens, N cached entries, H hidden, K key/value heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.plan import Stage, StagePlan
from pdtrim_pl.staged.architectures import Architecture
from pdtrim_pl.staged.cache import BlockKV, KVCache, OneBlockCache, Slots, attention_mask

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
    """One pass of one stage over new tokens. It travels through the model as its `past_key_values`."""

    stage: Stage
    plan: StagePlan
    tokens: Slots
    """Positions and validity of the new tokens, [B, T]."""
    past: KVCache | None
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
    _slots: dict[int | None, Slots] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = frozenset(self.plan.blocks(self.stage))
        self.projects = frozenset(self.plan.kv_only) if self.stage == "prefill" else frozenset[int]()
        self.sends = frozenset(self.plan.decode)
        self.all_valid = bool(self.tokens.valid.all())
        if self.resume is not None:
            self.cached.update({i: kv for i, kv in self.resume.cached.items() if i < self.resume.block})

    def slots(self, past: BlockKV | None) -> Slots:
        """Slots of a block's entries after this pass, shared between blocks that share a past."""
        key = None if past is None else id(past.slots)
        if key not in self._slots:
            self._slots[key] = self.tokens if past is None else past.slots.extended(self.tokens)
        return self._slots[key]

    def mask(self, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Mask of the new tokens over `slots`, [B, 1, T, N], built once for equal arguments.

        None where fused attention needs none: a plain causal prompt, or one token that sees everything.
        """
        key = (id(slots), window, dtype)
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
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, lowest)


class Gate(nn.Module):
    """Stands in a model's block list for one block and obeys the plan of the pass that reaches it."""

    def __init__(self, block: nn.Module, index: int, window: int | None, architecture: Architecture) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.window = window
        self.architecture = architecture
        self.untied = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        """Some models read attributes of their blocks, such as `attention_type`; the block answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def weights(self, stage: Stage, plan: StagePlan) -> nn.Module:
        """The block whose weights `stage` uses under `plan`: its own where untied there, else the shared one."""
        return self.untied[stage] if self.index in plan.untied[stage] else self.block

    def untie(self, stage: Stage) -> None:
        """Give `stage` weights of its own, starting from the shared ones."""
        if stage not in self.untied:
            # The copy reads the model's own configuration, so that a change of attention implementation reaches it.
            configs = [vars(module).get("config") for module in self.block.modules()]
            shared = {id(config): config for config in configs if config is not None}
            self.untied[stage] = copy.deepcopy(self.block, shared).requires_grad_(True)

    def forward(self, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Run, project or skip; hidden state in and out, [B, T, H]."""
        current: StagePass = kwargs[self.architecture.cache_argument]
        if current.resume is not None:
            if self.index < current.resume.block:
                return hidden
            if self.index == current.resume.block:
                hidden = current.resume.hidden
        block = self.weights(current.stage, current.plan)
        if self.index in current.projects:
            keys, values = self.architecture.keys_values(block, hidden, kwargs["position_embeddings"])
            current.cached[self.index] = BlockKV(keys, values, current.tokens)
            return hidden
        if self.index not in current.runs:
            return hidden
        past = current.past.blocks[self.index] if current.past is not None else None
        slots = current.slots(past)
        kwargs["attention_mask"] = current.mask(slots, self.window, hidden.dtype)
        kwargs["use_cache"] = True
        old = (past.keys, past.values) if past is not None else (None, None)
        if current.recompute and torch.is_grad_enabled():
            out, keys, values = checkpoint(self._run, block, kwargs, hidden, *old, use_reentrant=False)
        else:
            out, keys, values = self._run(block, kwargs, hidden, *old)
        if current.observer is not None:
            current.observer(self.index, hidden, out)
        if current.keep and self.index in current.sends:
            current.cached[self.index] = BlockKV(keys, values, slots)
        return out

    def _run(
        self, block: nn.Module, kwargs: dict[str, Any], hidden: Tensor, keys: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache = OneBlockCache(keys, values)
        out: Tensor = block(hidden, **{**kwargs, self.architecture.cache_argument: cache})
        assert cache.keys is not None
        assert cache.values is not None
        return out, cache.keys, cache.values
