"""Fitted blocks from the rank that fitted them to all others: facts as objects, weights tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from pdtrim_pl.merging.trial import empty_block
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.fitted_run import FittedRun

T = TypeVar("T")


def share_of(ranks: Parallel, runs: Sequence[T]) -> list[T]:
    """The runs that this rank fits: every `size`-th one, or all of them where no rank can run a block alone.

    All ranks have equally many, for they check in before every group of fits. One that has none left fits the last run
    again, and `exchanged` ignores what it found.
    """
    if not ranks.whole:
        return list(runs)
    return [runs[min(first + ranks.rank, len(runs) - 1)] for first in range(0, len(runs), ranks.size)]


def exchanged(student: StagedCausalLM, mine: Sequence[FittedRun], count: int, ranks: Parallel) -> list[FittedRun]:
    """All runs, fitted by the ranks that have them as their share, alike on every rank; every rank must call it.

    Args:
        student: whose blocks were fitted; it is not changed.
        mine: what this rank made of its share.
        count: runs in all.
        ranks: who took part.
    """
    if ranks.size == 1:
        return list(mine)
    told = ranks.gather([(replace(run, weights=None, trailing_blocks={}), sorted(run.blocks)) for run in mine])
    owners = [(index % ranks.size, index // ranks.size) if ranks.whole else (0, index) for index in range(count)]
    parcels = [_Parcel(owner, *told[owner][place]) for owner, place in owners]

    def unpack() -> None:
        for parcel, (owner, place) in zip(parcels, owners, strict=True):
            held = mine[place].blocks if owner == ranks.rank or not ranks.whole else {}
            for index in parcel.indices:
                known = index in held
                parcel.blocks[index] = held[index] if known else empty_block(student, index, whole=ranks.whole)

    ranks.together(unpack)  # where one has no memory for them, none waits for it
    return [parcel.delivered(ranks.hand_out) for parcel in parcels]


@dataclass
class _Parcel:
    """One run on its way."""

    owner: int
    facts: FittedRun
    """Without blocks."""
    indices: list[int]

    def __post_init__(self) -> None:
        self.blocks: dict[int, nn.Module] = {}

    @torch.no_grad()
    def delivered(self, hand_out: Callable[[torch.Tensor, int], None]) -> FittedRun:
        for index in self.indices:
            for tensor in self.blocks[index].state_dict().values():
                hand_out(tensor, self.owner)
        into = self.facts.move.into
        assert into is not None
        trailing_blocks = {index: block for index, block in self.blocks.items() if index != into}
        return replace(self.facts, weights=self.blocks.get(into), trailing_blocks=trailing_blocks)
