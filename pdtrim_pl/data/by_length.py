"""Batches of examples of like lengths, so that little is padded."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from pdtrim_pl.data.examples import Example, lengths_of

STRIP = 8
"""Steps that are sorted by response after sorting by prompt; a pool has as many strips."""


class ByLengthSampler(DistributedSampler[Any]):
    """Shuffles a data part in every epoch, so that each batch has prompts, and responses, of like lengths.

    The shuffled part is cut into pools of `STRIP * STRIP` steps; a step is one batch of every rank. A pool is sorted by
    the length of the prompts and cut into strips, and each strip is sorted by the length of the responses. Steps then
    follow in random order. All ranks take like lengths in a step, so none waits long for another.

    Args:
        part: the examples.
        batch_size: examples in a batch of one rank.
        num_replicas: number of ranks.
        rank: the rank that asks.
        seed: seed of the order, the same on every rank.
    """

    def __init__(self, part: Subset[Example], batch_size: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(part, num_replicas, rank, shuffle=True, seed=seed)
        self.lengths = lengths_of(part)
        self.batch_size = batch_size

    @override
    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = np.resize(generator.permutation(len(self.lengths)), self.total_size)  # equally many for every rank
        step = self.batch_size * self.num_replicas
        steps = [chunk for pool in _chunks(order, STRIP * STRIP * step) for chunk in self._sorted(pool, step)]
        last = [steps.pop()] if len(steps[-1]) < step else []
        shuffled = [*(steps[index] for index in generator.permutation(len(steps))), *last]
        return iter(np.concatenate([np.split(one, self.num_replicas)[self.rank] for one in shuffled]).tolist())

    def _sorted(self, pool: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
        """The steps of one pool; only the last may be smaller."""
        prompts, responses = self.lengths.T
        strips = _chunks(pool[np.argsort(prompts[pool], kind="stable")], STRIP * step)
        by_response = (strip[np.argsort(responses[strip], kind="stable")] for strip in strips)
        return [chunk for strip in by_response for chunk in _chunks(strip, step)]


def _chunks(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(indices, range(size, len(indices), size))
