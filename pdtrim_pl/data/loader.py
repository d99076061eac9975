"""A loader that can continue in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.data.examples import Example


class ResumableLoader(DataLoader[Example]):
    """A `DataLoader` whose state is the number of batches that it has yielded in this epoch.

    Lightning saves the state in its checkpoints and restores it. The order of the sampler must depend only on its seed
    and epoch, as with `DistributedSampler`. Then the number of batches is the whole state, and `num_workers` may differ
    between the two runs. The `StatefulDataLoader` of torchdata does not work here: with Lightning 2.6, a run that
    resumes at the end of an epoch gets the order of that epoch again.
    """

    _given = 0
    _resume_at = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._given, self._resume_at = self._resume_at, 0
        for batch in self._rest(self._given) if self._given else super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches yielded in this epoch; 0 if the epoch is over."""
        return {"batches_given": self._given % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start after the batches that were already yielded."""
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
