"""Continuous batching on the decode side: rows join and leave a running batch between any two steps.

Shapes: B rows, K key/value heads, N entries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.staged.cache import BlockKV, KVCache, Slots
from pdtrim_pl.staged.decoding import PickToken
from pdtrim_pl.staged.model import StagedCausalLM
from pdtrim_pl.staged.preallocated import PreallocatedCache


@dataclass
class Row:
    """One request of a running batch."""

    request: int
    pick: PickToken
    """Chooses its tokens, from logits [1, V]."""
    stop_ids: frozenset[int]
    left: int
    """Most tokens that are still to come."""
    fed: int
    """The next input of decode."""

    @property
    def ended(self) -> bool:
        """Whether no token is to come."""
        return self.left < 1

    def take(self, token: int) -> None:
        """Count a token of the response, which is the next input."""
        self.fed, self.left = token, 0 if token in self.stop_ids else self.left - 1


class RunningBatch:
    """Requests that decode together, each at its own position.

    Args:
        staged: the model that decodes.
    """

    def __init__(self, staged: StagedCausalLM) -> None:
        self.staged = staged
        self.rows: list[Row] = []
        self._cache: PreallocatedCache | None = None

    def join(self, new: Sequence[tuple[Row, KVCache]]) -> None:
        """Take up requests with what prefill sent of their prompts, each of one row."""
        if new:
            self._rebuild(self.rows, [row for row, _ in new], [cache for _, cache in new])

    def leave(self, requests: Collection[int]) -> None:
        """Let requests go. Their memory is freed."""
        kept = [row for row in self.rows if row.request not in requests]
        if len(kept) < len(self.rows):
            self._rebuild(kept, [], [])

    @torch.no_grad()
    def step(self) -> list[tuple[Row, int]]:
        """One token for every row. Rows that end leave the batch; they are among the returned ones."""
        assert self._cache is not None, "a step needs rows"
        fed = torch.tensor([row.fed for row in self.rows], device=self._cache.lengths.device)
        logits = self.staged.logits(self.staged.step(fed, self._cache))
        found = []
        for at, row in enumerate(self.rows):
            token = int(row.pick(logits[at : at + 1]))
            row.take(token)
            found.append((row, token))
        self.leave({row.request for row in self.rows if row.ended})
        return found

    @torch.no_grad()
    def _rebuild(self, kept: Sequence[Row], new: Sequence[Row], caches: Sequence[KVCache]) -> None:
        parts = list(caches)
        if kept:
            assert self._cache is not None
            at = [self.rows.index(row) for row in kept]
            parts.insert(0, self._cache.rows(torch.tensor(at, device=self._cache.lengths.device)))
        self.rows = [*kept, *new]
        self._cache = PreallocatedCache(merged(parts), max(row.left for row in self.rows)) if parts else None


def merged(caches: Sequence[KVCache]) -> KVCache:
    """One cache with the rows of several, which have entries for the same blocks. Shorter ones get invalid entries."""
    if len(caches) == 1:
        return caches[0]
    shared: dict[tuple[int, ...], Slots] = {}
    blocks: dict[int, BlockKV] = {}
    for index in caches[0].blocks:
        parts = [cache.blocks[index] for cache in caches]
        width = max(part.slots.valid.shape[1] for part in parts)
        key = tuple(id(part.slots) for part in parts)
        if key not in shared:
            shared[key] = Slots(
                torch.cat([_widened(part.slots.positions, 1, width) for part in parts]),
                torch.cat([_widened(part.slots.valid, 1, width) for part in parts]),
            )
        keys = torch.cat([_widened(part.keys, 2, width) for part in parts])
        blocks[index] = BlockKV(keys, torch.cat([_widened(part.values, 2, width) for part in parts]), shared[key])
    return KVCache(blocks, torch.cat([cache.lengths for cache in caches]))


def _widened(x: Tensor, dim: int, width: int) -> Tensor:
    """`x` with zeros at the end of `dim`, up to `width`."""
    after = [0, 0] * (x.dim() - 1 - dim)
    return F.pad(x, (*after, 0, width - x.shape[dim]))
