"""A preallocated KV cache: decode writes new keys and values in place, and attention reads a view.

No class here is a dataclass: FSDP copies dataclasses that are passed to a module, and the copy would get the writes.

Shapes: B batch, K key/value heads, N entries so far, T new tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_pl.staged.cache import BlockKV, KVCache, OneBlockCache, Slots


class PreallocatedSlots:
    """Slots with room for new tokens after the entries. Blocks that keep the same entries share one object."""

    def __init__(self, sent: Slots, room: int) -> None:
        self._filled = sent.valid.shape[1]
        self._positions, self._valid = _with_room(sent.positions, 1, room), _with_room(sent.valid, 1, room)

    def extended(self, new: Slots) -> Slots:
        """Write the slots of new tokens [B, T] after the others; returns all slots, [B, N + T]."""
        start, self._filled = self._filled, self._filled + new.valid.shape[1]
        assert self._filled <= self._valid.shape[1], "no room: assigning past the end of the cache would write nothing"
        self._positions[:, start : self._filled] = new.positions
        self._valid[:, start : self._filled] = new.valid
        return Slots(self._positions[:, : self._filled], self._valid[:, : self._filled])

    def left_justified(self, rows: Tensor) -> tuple[Tensor, Slots]:
        """Places [B, N] of the valid entries of some rows, in order, and their slots. Rows may have fewer than N."""
        valid, positions = self._valid[rows, : self._filled], self._positions[rows, : self._filled]
        order = torch.argsort(~valid, dim=1, stable=True)[:, : int(valid.sum(dim=1).max())]
        return order, Slots(positions.gather(1, order), valid.gather(1, order))


class PreallocatedKV(OneBlockCache):
    """Keys and values of one block with room for new tokens; the cache object of a Hugging Face attention module."""

    def __init__(self, sent: BlockKV, slots: PreallocatedSlots, room: int) -> None:
        super().__init__()
        self.slots = slots
        self._filled = sent.keys.shape[2]
        self._all_keys, self._all_values = _with_room(sent.keys, 2, room), _with_room(sent.values, 2, room)

    def attention_cache(self) -> OneBlockCache:
        """The cache object for attention: this object itself, which attention writes into."""
        return self

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, K, T, D] after the others; returns views of all of them, [B, K, N + T, D]."""
        if self._all_keys.dtype != keys.dtype or self._all_values.dtype != values.dtype:
            self._all_keys, self._all_values = self._all_keys.to(keys.dtype), self._all_values.to(values.dtype)
        start, self._filled = self._filled, self._filled + keys.shape[2]
        self._all_keys[:, :, start : self._filled] = keys
        self._all_values[:, :, start : self._filled] = values
        self.keys, self.values = self._all_keys[:, :, : self._filled], self._all_values[:, :, : self._filled]
        return self.keys, self.values

    def entries(self, rows: Tensor, order: Tensor, slots: Slots) -> BlockKV:
        """A copy of the entries of some rows at places `order` [B, N]."""
        keys, values = self._all_keys[rows, :, : self._filled], self._all_values[rows, :, : self._filled]
        return BlockKV(keys, values, slots).at(order, slots)


class PreallocatedCache:
    """A copy of the cache that prefill sent, with room for the tokens that decode adds.

    Args:
        sent: the cache that prefill sent. It is neither changed nor kept.
        room: number of tokens that each row may add.
    """

    def __init__(self, sent: KVCache, room: int) -> None:
        slots = {id(kv.slots): PreallocatedSlots(kv.slots, room) for kv in sent.blocks.values()}
        self.blocks = {index: PreallocatedKV(kv, slots[id(kv.slots)], room) for index, kv in sent.blocks.items()}
        """Original block index -> its entries."""
        self.lengths = sent.lengths
        """True position of each row's next token, [B]."""

    def rows(self, rows: Tensor) -> KVCache:
        """A copy of what some rows hold, left-justified, without places that none of them uses.

        Args:
            rows: their indices, [B].
        """
        found = {id(kv.slots): kv.slots.left_justified(rows) for kv in self.blocks.values()}
        blocks = {index: kv.entries(rows, *found[id(kv.slots)]) for index, kv in self.blocks.items()}
        return KVCache(blocks, self.lengths[rows])

    def next_slots(self) -> Slots:
        """Slots of the next token of every row, [B, 1]."""
        positions = self.lengths[:, None]
        return Slots(positions, torch.ones_like(positions, dtype=torch.bool))

    def advance(self) -> None:
        """Move every row on by one position, after all blocks have written a token."""
        self.lengths = self.lengths + 1


def _with_room(x: Tensor, dim: int, room: int) -> Tensor:
    """A copy of `x` with `room` more, uninitialised entries at the end of `dim`."""
    shape = list(x.shape)
    shape[dim] += room
    whole = x.new_empty(shape)
    whole.narrow(dim, 0, x.shape[dim]).copy_(x)
    return whole
