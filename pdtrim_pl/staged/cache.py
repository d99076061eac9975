"""The KV cache: keys and values of original blocks at true positions, what a policy keeps of them, attention masks.

Shapes: B batch, K key/value heads, N cached entries, T new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.plan import NO_CODEC, Codec, KVRetentionPolicy, Retention
from pdtrim_pl.staged.rows import Rows, as_tensor
from pdtrim_pl.wire.codecs import encoded_keys, encoded_values, transferred
from pdtrim_pl.wire.packing import packed


@dataclass(frozen=True, eq=False)
class Slots:
    """True position and validity of every entry of a cache, each [B, N]. Padding is not valid.

    Blocks that keep the same entries share one `Slots` object, so one attention mask serves all of them.
    """

    positions: Tensor
    valid: Tensor
    rows: Rows | None = None
    """The same for the host; None if it is known on the device only."""
    has_holes: bool = False
    """Whether positions before the last one may be missing."""

    def extended(self, other: Slots) -> Slots:
        """These entries followed by those of `other`."""
        positions = torch.cat([self.positions, other.positions], dim=1)
        rows = self.rows.followed_by(other.rows, self.valid.shape[1]) if self.rows and other.rows else None
        holes = self.has_holes or other.has_holes
        return Slots(positions, torch.cat([self.valid, other.valid], dim=1), rows, holes)

    def kept_by(self, rule: Retention) -> tuple[Tensor, Slots]:
        """Indices [B, kept] of the entries that a rule keeps, left-justified in each row, and their slots."""
        lengths = self.valid.sum(dim=1)
        each = self.rows.counts if self.rows is not None and self.rows.have_no_gap else lengths.tolist()
        counts = as_tensor([rule.counts(n) for n in each], self.valid.device)
        first, last = counts[:, :1], lengths[:, None] - counts[:, 1:]
        keep = self.valid & ((self.positions < first) | (self.positions >= last))
        kept = [rule.kept(n) for n in each]
        order = torch.argsort(~keep, dim=1, stable=True)[:, : max(kept)]
        rows = Rows(tuple(range(n) for n in kept), self.rows.positions) if self.rows is not None else None
        holes = self.has_holes or rule.keep != "all"
        return order, Slots(self.positions.gather(1, order), keep.gather(1, order), rows, holes)


@dataclass(frozen=True, eq=False)
class BlockKV:
    """Keys (with RoPE at true positions) and values of one block, each [B, K, N, D], and their slots."""

    keys: Tensor
    values: Tensor
    slots: Slots

    def attention_cache(self) -> OneBlockCache:
        """The cache object for attention, which appends to it. These entries do not change."""
        return OneBlockCache(self.keys, self.values)

    def at(self, order: Tensor, slots: Slots) -> BlockKV:
        """The entries at `order` [B, kept]."""
        index = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        return BlockKV(self.keys.gather(2, index), self.values.gather(2, index), slots)

    def transferred(self, codec: Codec) -> BlockKV:
        """Encode and decode these entries with a codec: the result is what decode attends to.

        The entries must be left-justified.
        """
        if codec.is_none:
            return self
        keys, values = transferred(self.keys, self.values, self.slots.valid.sum(dim=1), codec)
        return BlockKV(keys, values, self.slots)

    def packed(self, codec: Codec) -> Tensor:
        """The bytes of these entries on the wire, encoded with a codec, uint8. The entries must be left-justified.

        Raises:
            FloatingPointError: the codec rounds, and keys or values are not finite.
        """
        if not self.keys.shape[2]:
            return torch.empty(0, dtype=torch.uint8, device=self.keys.device)
        if not codec.is_none and not bool(self.keys.isfinite().all() & self.values.isfinite().all()):
            raise FloatingPointError("Keys or values of the prompt are not finite: export the pair in another `dtype`.")
        counts = self.slots.valid.sum(dim=1)
        keys, values = encoded_keys(self.keys, counts, codec), encoded_values(self.values, counts, codec)
        return packed(keys, values, counts.tolist())


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values that prefill sends to decode, and those that decode adds."""

    blocks: Mapping[int, BlockKV]
    """Original block index -> its entries."""
    lengths: Tensor
    """True position of each row's next token, [B]."""

    def retained(self, policy: KVRetentionPolicy | None) -> KVCache:
        """The part of a prompt's cache that decode gets under `policy`, as its codecs deliver it.

        Gradients flow through the result. Rounding passes them on unchanged (straight-through). None keeps everything.
        """
        if policy is None:
            return self
        keep, blocks = keeper(), dict[int, BlockKV]()
        for index, block in self.blocks.items():
            rule = policy.rule(index)
            blocks[index] = block if rule.is_whole else keep(block, rule).transferred(rule.codec)
        return KVCache(blocks, self.lengths)


def keeper() -> Callable[[BlockKV, Retention], BlockKV]:
    """Make a function that returns the entries of a block that a rule keeps, left-justified.

    The function remembers the slots that it computed: blocks that shared their slots before share them afterwards.
    """
    known: dict[tuple[int, Retention], tuple[Tensor, Slots]] = {}

    def keep(block: BlockKV, rule: Retention) -> BlockKV:
        key = (id(block.slots), rule.written_as(NO_CODEC))
        if key not in known:
            known[key] = block.slots.kept_by(rule)
        return block.at(*known[key])

    return keep


class OneBlockCache:
    """The cache object that a Hugging Face attention module gets. It holds the past of one block, then the result.

    It ignores the `layer_idx` of the module, so blocks may be missing or renumbered, and their lengths may differ.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, K, T, D] and return all of them."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys.to(keys.dtype), keys], dim=2)
            values = torch.cat([self.values.to(values.dtype), values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def attention_mask(queries: Slots, entries: Slots, window: int | None) -> Tensor:
    """Which cached entries each new token may see, boolean [B, 1, T, N]; the new tokens are the last T entries.

    Every token sees itself, so the softmax of a padding row is never empty. All tensors of T x N elements are boolean:
    at 32 768 tokens such a tensor takes 1 GiB a row, and differences of positions (int64) would take 8 GiB.
    """
    asked, held = queries.positions[:, :, None], entries.positions[:, None, :]
    seen = held <= asked
    seen &= entries.valid[:, None, :]
    if window is not None:
        seen &= held > asked - window
    new = queries.positions.shape[1]
    seen[:, :, entries.positions.shape[1] - new :].diagonal(dim1=1, dim2=2).fill_(True)
    return seen[:, None]
