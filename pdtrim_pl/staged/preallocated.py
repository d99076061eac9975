"""A cache with room for the tokens to come: decode writes new keys and values in place, and attention sees a view.

No class here is a dataclass: FSDP copies the dataclasses that a stage is given, and a copy would miss what is written.

Shapes: B batch, K key/value heads, N entries so far, T new tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_pl.staged.cache import BlockKV, KVCache, OneBlockCache, Slots


class PreallocatedSlots:
    """Where the entries of blocks that keep the same ones stand, with room behind them."""

    def __init__(self, sent: Slots, room: int) -> None:
        self._filled = sent.valid.shape[1]
        self._positions, self._valid = _with_room(sent.positions, 1, room), _with_room(sent.valid, 1, room)

    def extended(self, new: Slots) -> Slots:
        """Write the slots of new tokens [B, T] behind the others; returns all of them, [B, N + T]."""
        start, self._filled = self._filled, self._filled + new.valid.shape[1]
        assert self._filled <= self._valid.shape[1], "no room: a slice past the end takes anything and keeps nothing"
        self._positions[:, start : self._filled] = new.positions
        self._valid[:, start : self._filled] = new.valid
        return Slots(self._positions[:, : self._filled], self._valid[:, : self._filled])


class PreallocatedKV(OneBlockCache):
    """Keys and values of one block with room behind them; what a Hugging Face attention module sees as its cache."""

    def __init__(self, sent: BlockKV, slots: PreallocatedSlots, room: int) -> None:
        super().__init__()
        self.slots = slots
        self._filled = sent.keys.shape[2]
        self._all_keys, self._all_values = _with_room(sent.keys, 2, room), _with_room(sent.values, 2, room)

    def opened(self) -> OneBlockCache:
        """What attention appends to: these entries themselves."""
        return self

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, K, T, D] behind the others; returns views of all of them, [B, K, N + T, D]."""
        if self._all_keys.dtype != keys.dtype or self._all_values.dtype != values.dtype:
            self._all_keys, self._all_values = self._all_keys.to(keys.dtype), self._all_values.to(values.dtype)
        start, self._filled = self._filled, self._filled + keys.shape[2]
        self._all_keys[:, :, start : self._filled] = keys
        self._all_values[:, :, start : self._filled] = values
        self.keys, self.values = self._all_keys[:, :, : self._filled], self._all_values[:, :, : self._filled]
        return self.keys, self.values


class PreallocatedCache:
    """What crossed from prefill to decode, copied once, with room for what decode adds.

    Args:
        sent: what prefill sent; it is not changed, nor kept.
        room: tokens to come, of every row.
    """

    def __init__(self, sent: KVCache, room: int) -> None:
        slots = {id(kv.slots): PreallocatedSlots(kv.slots, room) for kv in sent.blocks.values()}
        self.blocks = {index: PreallocatedKV(kv, slots[id(kv.slots)], room) for index, kv in sent.blocks.items()}
        """Original block index -> its entries."""
        self.lengths = sent.lengths
        """True position of each row's next token, [B]."""

    def next_slots(self) -> Slots:
        """Where the next token of every row stands, [B, 1]."""
        positions = self.lengths[:, None]
        return Slots(positions, torch.ones_like(positions, dtype=torch.bool))

    def advance(self) -> None:
        """Count the token that every block has taken in."""
        self.lengths = self.lengths + 1


def _with_room(x: Tensor, dim: int, room: int) -> Tensor:
    """A copy of `x` with `room` more entries along `dim`, not yet written."""
    shape = list(x.shape)
    shape[dim] += room
    whole = x.new_empty(shape)
    whole.narrow(dim, 0, x.shape[dim]).copy_(x)
    return whole
