"""Keys and values of original blocks at their true positions, what a policy keeps of them, and the masks they imply.

Shapes: B batch, K key/value heads, N cached entries, T new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.plan import NO_CODEC, Codec, KVRetentionPolicy, Retention
from pdtrim_pl.wire.codecs import encoded_keys, encoded_values, transferred
from pdtrim_pl.wire.packing import packed


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the entries of a cache stand: true position and whether they count, each [B, N].

    Blocks that keep the same entries share one object, so a mask is built once for all of them.
    """

    positions: Tensor
    valid: Tensor

    def extended(self, other: Slots) -> Slots:
        """These entries followed by those of `other`."""
        positions = torch.cat([self.positions, other.positions], dim=1)
        return Slots(positions, torch.cat([self.valid, other.valid], dim=1))

    def kept_by(self, rule: Retention) -> tuple[Tensor, Slots]:
        """The entries a rule keeps: their indices [B, kept], left-justified row by row, and their slots."""
        lengths = self.valid.sum(dim=1)
        counts = torch.tensor([rule.counts(n) for n in lengths.tolist()], device=self.valid.device)
        first, last = counts[:, :1], lengths[:, None] - counts[:, 1:]
        keep = self.valid & ((self.positions < first) | (self.positions >= last))
        most = int(keep.sum(dim=1).max())
        order = torch.argsort(~keep, dim=1, stable=True)[:, :most]
        return order, Slots(self.positions.gather(1, order), keep.gather(1, order))


@dataclass(frozen=True, eq=False)
class BlockKV:
    """Keys (RoPE applied at true positions) and values of one block, each [B, K, N, D], and where they stand."""

    keys: Tensor
    values: Tensor
    slots: Slots

    def opened(self) -> OneBlockCache:
        """What attention appends to; these entries stay as they are."""
        return OneBlockCache(self.keys, self.values)

    def at(self, order: Tensor, slots: Slots) -> BlockKV:
        """The entries at `order` [B, kept]."""
        index = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        return BlockKV(self.keys.gather(2, index), self.values.gather(2, index), slots)

    def transferred(self, codec: Codec) -> BlockKV:
        """These left-justified entries as decode sees them after they crossed under a codec."""
        if codec.is_none:
            return self
        keys, values = transferred(self.keys, self.values, self.slots.valid.sum(dim=1), codec)
        return BlockKV(keys, values, self.slots)

    def packed(self, codec: Codec) -> Tensor:
        """These left-justified entries as the bytes that cross under a codec, uint8.

        Raises:
            FloatingPointError: keys or values that are to be rounded are not finite.
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
    """What crosses from prefill to decode, and what decode adds to it."""

    blocks: Mapping[int, BlockKV]
    """Original block index -> its entries."""
    lengths: Tensor
    """True position of each row's next token, [B]."""

    def retained(self, policy: KVRetentionPolicy | None) -> KVCache:
        """What decode gets of a prompt's cache under `policy`; gradients flow through it, and through codecs."""
        if policy is None:
            return self
        keep, blocks = keeper(), dict[int, BlockKV]()
        for index, block in self.blocks.items():
            rule = policy.rule(index)
            blocks[index] = block if rule.is_whole else keep(block, rule).transferred(rule.codec)
        return KVCache(blocks, self.lengths)


def keeper() -> Callable[[BlockKV, Retention], BlockKV]:
    """A function that takes the entries that a rule keeps of a block, left-justified.

    Blocks that share their slots share those of what is kept.
    """
    known: dict[tuple[int, Retention], tuple[Tensor, Slots]] = {}

    def keep(block: BlockKV, rule: Retention) -> BlockKV:
        key = (id(block.slots), rule.written_as(NO_CODEC))
        if key not in known:
            known[key] = block.slots.kept_by(rule)
        return block.at(*known[key])

    return keep


class OneBlockCache:
    """What a Hugging Face attention module sees as its cache: the past of one block, and a place for the result.

    The module's `layer_idx` is ignored, so blocks may be missing, renumbered or of unequal length.
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

    A token always sees itself, so that padding rows have no empty softmax. No tensor of T x N elements is wider than a
    byte: at 32 768 tokens the mask of one row takes 1 GiB, and differences of positions would take 8.
    """
    asked, held = queries.positions[:, :, None], entries.positions[:, None, :]
    seen = held <= asked
    seen &= entries.valid[:, None, :]
    if window is not None:
        seen &= held > asked - window
    new = queries.positions.shape[1]
    seen[:, :, entries.positions.shape[1] - new :].diagonal(dim1=1, dim2=2).fill_(True)
    return seen[:, None]
