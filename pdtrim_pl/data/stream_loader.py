"""A loader of a source that is read on the fly. It can continue at any batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example, TokenExamples, weights_of
from pdtrim_pl.data.settings import Streaming
from pdtrim_pl.data.streamed import RankOrder, StreamedExamples
from pdtrim_pl.errors import UserError
from pdtrim_pl.parallel import of_every_rank

Changed = Callable[[Subset[Example]], Subset[Example]]
"""What is done to examples before training: some repeat their prompt."""


class Position(NamedTuple):
    """A place in the stream of one rank."""

    piece: int
    """Number of pieces of this rank before those that are shuffled together now."""
    given: int
    """Number of examples already given of these."""


class Bookmark:
    """Where the next batch of this rank begins. The data module keeps it, also in checkpoints."""

    def __init__(self) -> None:
        self.position = Position(0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks. Collective."""
        return {"positions": of_every_rank(list(self.position))}

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Take up the position of a rank."""
        self.position = Position(*state["positions"][rank])


@dataclass(frozen=True)
class Share:
    """What one rank reads, and how."""

    rank: int = 0
    ranks: int = 1
    batch_size: int = 8
    seed: int = 0
    workers: int = 0
    """Number of processes that tokenise; 0 for the main process. The batches do not depend on it."""


class StreamLoader:
    """Training batches of a source that is read on the fly.

    A rank reads its pieces in a random order, and shuffles the examples of as many pieces as fill the buffer. Pieces,
    order and shuffling depend on seeds alone, so a run that continues needs a position. It reads the pieces of the
    current buffer again, and no others. Every rank gives the same number of batches in an epoch. An epoch begins where
    the one before it ended; after the last piece of the source the next pass begins, in another order.

    Lightning keeps the state of a loader, the number of batches it has yielded in this epoch, only within an epoch.
    The position is in the bookmark.

    Args:
        pieces: the examples of every piece.
        settings: examples in an epoch and in a buffer.
        share: what this rank reads.
        bookmark: where to begin. It is kept up to date.
        pad_id: token id at padded positions.
        changed: what is done to the examples of a buffer before they are shuffled.
    """

    def __init__(
        self, pieces: StreamedExamples, settings: Streaming, share: Share, bookmark: Bookmark, pad_id: int,
        changed: Changed,
    ) -> None:  # fmt: skip
        self.pieces, self.settings, self.share, self.bookmark, self.changed = pieces, settings, share, bookmark, changed
        self.collate = Collator(pad_id)
        self.length = settings.examples // (share.batch_size * share.ranks)
        if self.length == 0:
            raise UserError(
                f"`source.streaming.examples`={settings.examples} is less than one step of "
                f"{share.batch_size * share.ranks} examples (`batch_size` on every rank); raise it."
            )
        self._order(0)  # refuses too few pieces
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

    def _order(self, at: int) -> RankOrder:
        return RankOrder(self.pieces, self.share.rank, self.share.ranks, self.share.seed, at)

    def _stream(self, at: Position) -> Iterator[tuple[Batch, Position]]:
        """Batches from a position on, each with the position behind it."""
        examples = self._examples(at)
        while True:
            found = list(islice(examples, self.share.batch_size))
            yield self.collate([example for example, _ in found]), found[-1][1]

    def _examples(self, at: Position) -> Iterator[tuple[Example, Position]]:
        skip = at.given
        for piece, pool in self._pools(at.piece):
            part = self.changed(Subset(pool, range(len(pool))))
            mean = float(weights_of(part).mean())
            order = np.random.default_rng((self.share.seed, self.share.rank, piece)).permutation(len(pool))
            for given, index in enumerate(order[skip:].tolist(), start=skip + 1):
                example = part[index]
                yield Example(example.prompt, example.response, example.weight / mean), Position(piece, given)
            skip = 0

    def _pools(self, at: int) -> Iterator[tuple[int, TokenExamples]]:
        """Examples that are shuffled together, each with the number of pieces before it."""
        order = self._order(at)
        reader = DataLoader(
            self.pieces, batch_size=None, sampler=order, num_workers=self.share.workers,
            generator=torch.Generator(),  # the global generator is reserved for training steps
        )  # fmt: skip
        pool: list[TokenExamples] = []
        first = at
        for done, piece in enumerate(reader, start=at + 1):
            pool.append(piece)
            count = sum(map(len, pool))
            if count >= self.settings.buffer:
                yield first, TokenExamples.joined(pool)
                pool, first = [], done
            elif count == 0 and len(pool) == order.a_pass:
                raise UserError("`source.streaming`: no piece of the text has an example for training; give more text.")
