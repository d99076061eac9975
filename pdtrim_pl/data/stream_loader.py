"""A loader of sources that are read on the fly. It can continue at any batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example, TokenExamples, weights_of
from pdtrim_pl.data.settings import Streaming
from pdtrim_pl.data.streamed import PieceReader, Place, RankOrder, StreamedExamples
from pdtrim_pl.errors import UserError
from pdtrim_pl.parallel import of_every_rank

Changed = Callable[[Subset[Example]], Subset[Example]]
"""What is done to examples before training: some repeat their prompt."""


class Position(NamedTuple):
    """A place in the stream of one rank."""

    places: tuple[Place, ...]
    """Per source, where the examples begin that are shuffled together now."""
    given: int
    """Number of examples already given of these."""


class Bookmark:
    """Where the next batch of this rank begins. The data module keeps it, also in checkpoints.

    Args:
        sources: number of sources.
    """

    def __init__(self, sources: int) -> None:
        self.position = Position((Place(),) * sources, 0)

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks. Collective."""
        places, given = self.position
        return {"positions": of_every_rank([list(map(list, places)), given])}

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Take up the position of a rank.

        Raises:
            UserError: the position is of another number of sources.
        """
        places, given = state["positions"][rank]
        if len(places) != len(self.position.places):
            raise UserError(
                f"The checkpoint is of {len(places)} streamed source(s), and `source` with `mixed_in` are "
                f"{len(self.position.places)}. Continue with the sources of that run, or start anew."
            )
        self.position = Position(tuple(Place(*place) for place in places), given)


@dataclass(frozen=True)
class Share:
    """What one rank reads, and how."""

    rank: int = 0
    ranks: int = 1
    batch_size: int = 8
    seed: int = 0
    workers: int = 0
    """Number of processes that tokenise each source; 0 for the main process. The batches do not depend on it."""


class StreamLoader:
    """Training batches of sources that are read on the fly.

    A rank reads its pieces of every source in a random order. Examples of all sources, by their shares, fill a buffer
    and are shuffled together. Pieces, order and shuffling depend on seeds alone, so a run that continues needs a
    position. It reads the pieces of the current buffer again, and no others. Every rank gives the same number of
    batches in an epoch. An epoch begins where the one before it ended; after the last piece of a source its next pass
    begins, in another order.

    Lightning keeps the state of a loader, the number of batches it has yielded in this epoch, only within an epoch.
    The position is in the bookmark.

    Args:
        sources: the examples of every piece of every source.
        settings: examples in an epoch and in a buffer.
        share: what this rank reads.
        bookmark: where to begin. It is kept up to date.
        pad_id: token id at padded positions.
        changed: what is done to the examples of a buffer before they are shuffled.

    Raises:
        UserError: there are too few pieces, or an epoch or a buffer is too small.
    """

    def __init__(
        self, sources: Sequence[StreamedExamples], settings: Streaming, share: Share, bookmark: Bookmark, pad_id: int,
        changed: Changed,
    ) -> None:  # fmt: skip
        self.share, self.bookmark, self.changed = share, bookmark, changed
        self.collate = Collator(pad_id)
        self.length = settings.examples // (share.batch_size * share.ranks)
        if self.length == 0:
            raise UserError(
                f"`source.streaming.examples`={settings.examples} is less than one step of "
                f"{share.batch_size * share.ranks} examples (`batch_size` on every rank); raise it."
            )
        self.counts = [round(settings.buffer * source.share) for source in sources]
        """Examples of every source in a buffer."""
        if 0 in self.counts:
            raise UserError(
                f"`source.streaming.buffer`={settings.buffer} is too small for the shares of `mixed_in`; raise it."
            )
        self.sources = sources
        self.orders = [RankOrder(source, share.rank, share.ranks, share.seed) for source in sources]
        self._given = 0
        self._resume_at = 0
        self._batches: Iterator[tuple[Batch, Position]] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        self._given, self._resume_at = self._resume_at, 0
        while self._given < self.length:
            if self._batches is None:
                self._batches = self._stream(self.bookmark.position)
            batch, self.bookmark.position = next(self._batches)
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches yielded in this epoch; 0 if the epoch is over."""
        return {"batches_given": self._given % self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration give the rest of the epoch, from the bookmark on."""
        self._given = self._resume_at = state["batches_given"]
        self._batches = None

    def _stream(self, at: Position) -> Iterator[tuple[Batch, Position]]:
        """Batches from a position on, each with the position behind it."""
        examples = self._examples(at)
        while True:
            found = list(islice(examples, self.share.batch_size))
            yield self.collate([example for example, _ in found]), found[-1][1]

    def _examples(self, at: Position) -> Iterator[tuple[Example, Position]]:
        skip = at.given
        readers = [
            PieceReader(self._pieces(source, order, place.piece), place, order.a_pass)
            for source, order, place in zip(self.sources, self.orders, at.places, strict=True)
        ]
        while True:
            places = tuple(reader.place for reader in readers)
            part = take_together(readers, self.counts, self.changed)
            mean = float(weights_of(part).mean())
            order = np.random.default_rng((self.share.seed, self.share.rank, *places[0])).permutation(len(part))
            for given, index in enumerate(order[skip:].tolist(), start=skip + 1):
                example = part[index]
                yield Example(example.prompt, example.response, example.weight / mean), Position(places, given)
            skip = 0

    def _pieces(self, source: StreamedExamples, order: RankOrder, first: int) -> Iterable[TokenExamples]:
        """The examples of this rank's pieces of a source, without end."""
        return DataLoader(
            source, batch_size=None, sampler=order.starting_at(first), num_workers=self.share.workers,
            generator=torch.Generator(),  # the global generator is reserved for training steps
        )  # fmt: skip


class FirstBatches:
    """Training text of streamed sources, in the order of the sources, mixed by their shares; for local fits.

    It ends where the first source ends.

    Args:
        sources: the examples of every piece of every source.
        size: examples in a batch.
        pad_id: token id at padded positions.
        changed: what is done to examples.
    """

    def __init__(self, sources: Sequence[StreamedExamples], size: int, pad_id: int, changed: Changed) -> None:
        self.sources, self.size, self.collate, self.changed = sources, size, Collator(pad_id), changed

    def __iter__(self) -> Iterator[Batch]:
        examples = self._examples()
        while rows := list(islice(examples, self.size)):
            yield self.collate(rows)

    def _examples(self) -> Iterator[Example]:
        readers = [PieceReader(source.in_order(), Place()) for source in self.sources]
        counts = [max(1, round(_TOGETHER * source.share)) for source in self.sources]
        more = True
        while more:
            part = take_together(readers, counts, self.changed)
            yield from (part[index] for index in range(len(part)))
            more = len(part) == sum(counts)


_TOGETHER = 64
"""Examples for local fits that are mixed by shares, and of which a share says its prompts again."""


def take_together(readers: Sequence[PieceReader], counts: Sequence[int], changed: Changed) -> Subset[Example]:
    """The next examples of every source, changed for training; fewer where a source has ended."""
    pool = TokenExamples.joined([reader.take(count) for reader, count in zip(readers, counts, strict=True)])
    return changed(Subset(pool, range(len(pool))))
