"""Batches of examples of like lengths, so that little is padded."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from pdtrim_pl.data.examples import Example, lengths_of

POOL = 256
"""Steps whose examples are put together by length."""


class ByLengthSampler(DistributedSampler[Any]):
    """Shuffles a data part in every epoch, so that each batch has prompts, and responses, of like lengths.

    The shuffled part is cut into pools of `POOL` steps; a step is one batch of every rank. A pool is cut in two, by the
    length of the prompts or of the responses, where that leaves the least padding, and so is each half, down to steps.
    Steps then follow in random order. All ranks take like lengths in a step, so none waits long for another.

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
        steps = [found for pool in _chunks(order, POOL * step) for found in self._steps(pool, step)]
        last = [steps.pop()] if len(steps[-1]) < step else []
        shuffled = [*(steps[index] for index in generator.permutation(len(steps))), *last]
        return iter(np.concatenate([np.split(one, self.num_replicas)[self.rank] for one in shuffled]).tolist())

    def _steps(self, pool: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
        """The steps of one pool; only the last may be smaller."""
        if len(pool) <= step:
            return [pool]
        cuts = [self._best_cut(pool[np.argsort(lengths[pool], kind="stable")], step) for lengths in self.lengths.T]
        _, left, right = min(cuts, key=lambda cut: cut[0])
        return [*self._steps(left, step), *self._steps(right, step)]

    def _best_cut(
        self, sorted_pool: NDArray[np.int64], step: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
        """Cut a pool behind a whole number of steps. Returns the tokens of both sides with padding, and both sides."""
        lengths = self.lengths[sorted_pool]
        before = np.maximum.accumulate(lengths).sum(axis=1)
        after = np.maximum.accumulate(lengths[::-1])[::-1].sum(axis=1)
        at = np.arange(step, len(sorted_pool), step)
        tokens = at * before[at - 1] + (len(sorted_pool) - at) * after[at]
        best = int(tokens.argmin())
        return int(tokens[best]), sorted_pool[: at[best]], sorted_pool[at[best] :]


def _chunks(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(indices, range(size, len(indices), size))
