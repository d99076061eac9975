"""A set of blocks to drop, chosen by a quadratic model of the response loss (after arXiv 2602.00161).

A gate before every block's contribution to the residual stream is 1, and 0 if the block is dropped. The model has the
gradients of the loss with respect to the gates and, for the curvature, their products. Both come from one backward pass
over the calibration set. The set of least modelled loss is found exactly, or by annealing if there are too many sets.

Shapes: E examples, C candidates, S sets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice
from math import comb, exp

import torch
from torch import Tensor

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.criteria.taylor import gate_effects
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.spread import measured_by_ranks
from pdtrim_pl.plan import StagePlan, Target

EXACT = 1_000_000
"""Maximum number of sets that are all evaluated."""
AT_ONCE = 1 << 16
STARTS, STEPS = 20, 4000


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """The change of the mean response loss if a set of blocks is dropped, to second order."""

    blocks: tuple[int, ...]
    """Original indices of the candidates."""
    linear: Tensor
    """Change of the loss if one block is dropped, to first order, nats [C]."""
    curvature: Tensor
    """Second derivatives with respect to the gates, [C, C]: the empirical Fisher matrix, products of the gradients of
    examples."""

    @classmethod
    def fitted(
        cls, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> QuadraticModel:
        """Fit the model on the calibration set. The batches are split among the ranks.

        Args:
            context: student and calibration set.
            plan: the plan before.
            target: the stage(s) that lose the blocks.
            candidates: original indices of the blocks that may be dropped.
        """

        def effects(batch: Batch, peers: Sequence[Batch]) -> Tensor:
            found = gate_effects(context, plan, target, candidates, batch, peers)
            return torch.stack([found[block].double().cpu() for block in candidates], dim=1)

        tokens = sum(int(batch.response_mask.sum()) for batch in context.batches)
        every = torch.cat(measured_by_ranks(context.ranks, context.batches, effects))  # [E, C]
        return cls(tuple(candidates), -every.sum(0) / tokens, every.T @ every / tokens)

    def change(self, sets: Tensor) -> Tensor:
        """The change of the loss for some sets, given as positions in `blocks`: [S, blocks of a set] -> [S]."""
        pairs = self.curvature[sets.unsqueeze(2), sets.unsqueeze(1)]
        return self.linear[sets].sum(1) + pairs.sum((1, 2)) / 2

    def least(self, count: int, seed: int = 0) -> tuple[tuple[int, ...], float]:
        """The set of `count` blocks with the least modelled loss, as original indices, and its change of the loss.

        It is exact for up to `EXACT` sets. Else it is the best of several annealings by exchanges.

        Raises:
            UserError: there are fewer candidates.
        """
        if count > len(self.blocks):
            raise UserError(f"{count} blocks cannot leave: {len(self.blocks)} may. Loosen the guards.")
        found = self._exact(count) if comb(len(self.blocks), count) <= EXACT else self._annealed(count, seed)
        change = float(self.change(torch.tensor([found]))) if count else 0.0
        return tuple(self.blocks[position] for position in sorted(found)), change

    def _exact(self, count: int) -> tuple[int, ...]:
        every = combinations(range(len(self.blocks)), count)
        least, best = float("inf"), tuple(range(count))
        while some := list(chain.from_iterable(islice(every, AT_ONCE))):
            sets = torch.tensor(some).view(-1, count)
            changes = self.change(sets)
            if float(changes.min()) < least:
                least, best = float(changes.min()), tuple(sets[int(changes.argmin())].tolist())
        return best

    def _annealed(self, count: int, seed: int) -> tuple[int, ...]:
        draw, best = random.Random(seed), (float("inf"), tuple(range(count)))
        for _ in range(STARTS):
            chosen = draw.sample(range(len(self.blocks)), count)
            energy = float(self.change(torch.tensor([chosen])))
            heat = abs(energy) / count
            for _ in range(STEPS):
                other = self._exchanged(chosen, draw)
                change = float(self.change(torch.tensor([other])))
                if change <= energy or draw.random() < exp((energy - change) / max(heat, 1e-12)):
                    chosen, energy = other, change
                    best = min(best, (energy, tuple(sorted(chosen))))
                heat *= 0.997
        return best[1]

    def _exchanged(self, chosen: list[int], draw: random.Random) -> list[int]:
        out = draw.randrange(len(chosen))
        into = draw.choice([position for position in range(len(self.blocks)) if position not in chosen])
        return [*chosen[:out], into, *chosen[out + 1 :]]
