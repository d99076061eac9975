"""A loader that can continue in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.data.examples import Example


class ResumableLoader(DataLoader[Example]):
    """A `DataLoader` over a dataset with indices whose state is the count of batches that it gave in this epoch.

    Lightning saves and loads the state with its checkpoints. The sampler's order must depend on its seed and epoch
    alone, as that of `DistributedSampler` does; then the count is all there is to know, and `num_workers` may change
    between two runs. torchdata's `StatefulDataLoader` does not do here: with Lightning 2.6, a run resumed from the end
    of an epoch is given that epoch's order again (measured; the tests compare a resumed run with an uninterrupted one).
    """

    _given = 0
    _resume_at = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._given, self._resume_at = self._resume_at, 0
        for batch in self._rest(self._given) if self._given else super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch; the start of the next one if this one is over."""
        return {"batches_given": self._given % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start at the saved place."""
        self._given = self._resume_at = state["batches_given"]

    def _rest(self, start: int) -> DataLoader[Example]:
        assert self.batch_sampler is not None
        return DataLoader(
            self.dataset,
            batch_sampler=list(self.batch_sampler)[start:],
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            generator=self.generator,
        )
