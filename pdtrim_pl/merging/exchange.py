"""Send fitted blocks from the rank that fitted them to all others: facts as objects, weights tensor by tensor."""

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
    """The runs that this rank fits: every `size`-th run. With sharded weights every rank fits all runs.

    All ranks get the same number of runs, since they synchronise before every group of fits. A rank without a run
    repeats the last one, and `exchanged` ignores the result.
    """
    if not ranks.whole:
        return list(runs)
    return [runs[min(first + ranks.rank, len(runs) - 1)] for first in range(0, len(runs), ranks.size)]


def exchanged(student: StagedCausalLM, mine: Sequence[FittedRun], count: int, ranks: Parallel) -> list[FittedRun]:
    """Collect all fitted runs on every rank. This is a collective: every rank must call it.

    Args:
        student: the model whose blocks were fitted. It is not changed.
        mine: the fitted runs of this rank's share.
        count: number of all runs.
        ranks: the ranks that took part.

    Returns:
        All runs in their order, the same on every rank.
    """
    if ranks.size == 1:
        return list(mine)
    facts = ranks.gather([(replace(run, weights=None, trailing_blocks={}), sorted(run.blocks)) for run in mine])
    owners = [(index % ranks.size, index // ranks.size) if ranks.whole else (0, index) for index in range(count)]
    transfers = [_Transfer(owner, *facts[owner][place]) for owner, place in owners]

    def allocate() -> None:
        for transfer, (owner, place) in zip(transfers, owners, strict=True):
            own = mine[place].blocks if owner == ranks.rank or not ranks.whole else {}
            for index in transfer.indices:
                known = index in own
                transfer.blocks[index] = own[index] if known else empty_block(student, index, whole=ranks.whole)

    ranks.together(allocate)  # if a rank runs out of memory, all stop instead of waiting for it
    return [transfer.received(ranks.hand_out) for transfer in transfers]


@dataclass
class _Transfer:
    """The transfer of one fitted run to all ranks."""

    owner: int
    """The rank that fitted the run."""
    facts: FittedRun
    """The run without its blocks."""
    indices: list[int]
    """Original indices of its blocks."""

    def __post_init__(self) -> None:
        self.blocks: dict[int, nn.Module] = {}

    @torch.no_grad()
    def received(self, hand_out: Callable[[torch.Tensor, int], None]) -> FittedRun:
        """Broadcast the weights from the owner, and return the whole run."""
        for index in self.indices:
            for tensor in self.blocks[index].state_dict().values():
                hand_out(tensor, self.owner)
        into = self.facts.move.into
        assert into is not None
        trailing_blocks = {index: block for index, block in self.blocks.items() if index != into}
        return replace(self.facts, weights=self.blocks.get(into), trailing_blocks=trailing_blocks)
