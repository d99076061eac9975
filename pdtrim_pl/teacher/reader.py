"""Read the teacher's distributions of a batch from disk.

Shapes: N response tokens of a batch (padding left out), K kept tokens of each distribution.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.rows import Rows
from pdtrim_pl.teacher.identity import CacheIdentity, example_key
from pdtrim_pl.teacher.index import CacheIndex


class StoredTeacher:
    """The teacher's distributions over some text, by the tokens of an example. Shards are memory-mapped.

    Args:
        folder: what `pdtrim cache-teacher` wrote.

    Raises:
        UserError: there is no whole cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, CacheIndex.load(folder)
        if not self.index.is_whole:
            raise UserError(
                f"The teacher's cache {folder} has {len(self.index.shards)} of {self.index.count} shards. Run `pdtrim "
                "cache-teacher` again with the same settings: it goes on where it was stopped."
            )
        self._shards: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        """Key of an example -> shard, first row, end."""
        for number, name in enumerate(sorted(self.index.shards)):
            shard: Any = safe_open(folder / name, framework="pt")
            self._shards.append(shard)
            bounds = shard.get_tensor("bounds").tolist()
            for row, key in enumerate(shard.get_tensor("keys").numpy()):
                self._places[key.tobytes()] = (number, bounds[row], bounds[row + 1])

    def check(self, run: CacheIdentity, keys: Iterable[bytes]) -> None:
        """Refuse a run that is not of what is stored.

        Args:
            run: what the run has.
            keys: those of its training examples. They may be a part of the stored ones.

        Raises:
            UserError: something differs. The message names it.
        """
        wanted = list(keys)
        said = self.index.identity.differences(run, same_text=False)
        if missing := sum(key not in self._places for key in wanted):
            said.append(
                f"the training text (`data.source`, `data.parts`, `data.seed`): {missing} of {len(wanted)} examples "
                "are not in the cache"
            )
        if said:
            raise UserError(
                f"`teacher.cache` {self.folder} is not of this run. They differ in {'; '.join(said)}. Write a cache of "
                "this run with `pdtrim cache-teacher`, or set them back."
            )

    def rows(self, batch: Batch) -> Tensor:
        """Packed rows of the real response tokens of a batch, in its order, [N, 2 K + 1] on the CPU.

        Raises:
            UserError: an example is not in the cache.
        """
        batch = batch.on("cpu")
        found = []
        for prompt, real, response, spoken in zip(*batch[:4], strict=True):
            place = self._places.get(example_key(prompt[real], response[spoken]))
            if place is None:
                raise UserError(
                    f"`teacher.cache` {self.folder} lacks an example of the training text. Write a cache of this run "
                    "with `pdtrim cache-teacher`."
                )
            number, first, end = place
            columns = (self._shards[number].get_slice(name)[first:end] for name in ("ids", "values", "extra"))
            found.append(Rows(*columns).packed())
        return torch.cat(found)
