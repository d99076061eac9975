"""Reads and writes keys and values in vLLM's paged cache, whatever the order of elements inside a block.

Shapes: N blocks of the cache, K key/value heads, S slots of a block, D head dimension, T entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError

Fill = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Writes keys [T, K, D] and values [T, K, D] into a cache [N, K, S, 2 D] at slots [T]: the engine's own operation."""
DIGIT = 256
"""Whole numbers below this one are exact in every element type of a cache."""


class CacheLayout(ABC):
    """Where the elements of an entry lie."""

    @abstractmethod
    def read(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots` [T], each [T, K, D]."""

    @abstractmethod
    def write(self, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [T, K, D] at `slots` [T]."""


class EntryLayout(CacheLayout):
    """The layout of GPU backends: a view [N, K, S, 2 D] with the key and then the value of an entry side by side."""

    def read(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        size = cache.shape[2]
        entries = cache[slots // size, :, slots % size]  # [T, K, 2 D]
        keys, values = entries.chunk(2, dim=-1)
        return keys.contiguous(), values.contiguous()

    def write(self, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        size = cache.shape[2]
        cache[slots // size, :, slots % size] = torch.cat([keys, values], dim=-1).to(cache.dtype)


class LearntLayout(CacheLayout):
    """The layout of the CPU backend, which depends on the instruction set: it is learnt from the engine's own write.

    Args:
        keys: place of each key element in the 2 S D elements of one block and head, [S, D].
        values: the same of the values.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def learn(cls, slots: int, width: int, dtype: torch.dtype, fill: Fill) -> LearntLayout:
        """Write a block in which every element has its own number, and look where the numbers are.

        Args:
            slots: slots of a block, S.
            width: head dimension, D.
            dtype: element type of the cache.
            fill: the engine's operation.

        Raises:
            UserError: elements get lost, so the cache is not a rearrangement of keys and values.
        """
        count = 2 * slots * width
        numbers = torch.arange(count)
        digits = [numbers % DIGIT, numbers // DIGIT % DIGIT, numbers // DIGIT**2]
        found = torch.zeros(count, dtype=torch.int64)
        for power, digit in enumerate(digits):
            keys, values = digit.to(dtype).view(2, slots, 1, width).unbind()
            cache = torch.zeros(1, 1, slots, 2 * width, dtype=dtype)
            fill(keys.contiguous(), values.contiguous(), cache, torch.arange(slots))
            found += cache.flatten().long() * DIGIT**power
        if not torch.equal(found.sort().values, numbers):
            raise UserError(
                "The engine's cache does not hold every element of keys and values once: this connector cannot read "
                f"it. Use `--kv-cache-dtype auto` and a `--block-size` other than {slots}."
            )
        places = found.argsort().view(2, slots, width)
        return cls(places[0], places[1])

    def read(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        flat, blocks, within = self._where(cache, slots)
        heads = torch.arange(cache.shape[1])[None, :, None]
        return flat[blocks, heads, self.keys[within][:, None]], flat[blocks, heads, self.values[within][:, None]]

    def write(self, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        flat, blocks, within = self._where(cache, slots)
        heads = torch.arange(cache.shape[1])[None, :, None]
        flat[blocks, heads, self.keys[within][:, None]] = keys.to(cache.dtype)
        flat[blocks, heads, self.values[within][:, None]] = values.to(cache.dtype)

    def _where(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, heads, size, _ = cache.shape
        return cache.view(count, heads, -1), (slots // size)[:, None, None], slots % size
