"""The examples of a source that is larger than memory, piece by piece; those at its head are held out."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.data.examples import TokenExamples
from pdtrim_pl.data.formatting import encode_piece
from pdtrim_pl.data.mixture import Chosen
from pdtrim_pl.data.model_limits import check_ids
from pdtrim_pl.data.pieces import PiecedSource
from pdtrim_pl.data.settings import Lengths
from pdtrim_pl.errors import UserError


@dataclass
class StreamedExamples(Dataset[TokenExamples]):
    """The examples of each piece, by its number: without duplicates within it, and without those that are held out.

    Args:
        source: the pieces.
        tokenizer: it makes tokens of them.
        lengths: lengths in tokens.
        seed: seed of the split points of raw text.
        vocab_size: number of rows of the model's embedding, if it is known.
        share: share of the examples that come from this source.
    """

    source: PiecedSource
    tokenizer: PreTrainedTokenizerBase
    lengths: Lengths
    seed: int
    vocab_size: int | None
    share: float = 1.0
    first: int = 0
    """Number of the first piece for training. Those before it are the head."""
    held_out: frozenset[bytes] = field(default=frozenset(), repr=False)
    """Tokens of the examples in the head."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> TokenExamples:
        examples = encode_piece(self.source.rows(number), self.tokenizer, self.lengths, (self.seed, number))
        if self.vocab_size is not None and len(examples):
            token = self.tokenizer.convert_ids_to_tokens(examples.largest_id)
            check_ids(examples.largest_id, str(token), self.vocab_size)
        return examples.selected(np.asarray(examples.distinct(self.held_out), dtype=np.int64))

    def hold_out(self, count: int) -> TokenExamples:
        """Take `count` examples from the head, as many pieces as it needs. Training begins behind these pieces.

        Raises:
            UserError: the source has too few examples.
        """
        found: list[TokenExamples] = []
        while sum(map(len, found)) < count and self.first < len(self):
            found.append(self[self.first])
            self.first += 1
            self.held_out |= frozenset(found[-1].texts())
        have = sum(map(len, found))
        if have < count or self.first == len(self):
            raise UserError(
                f"`source.streaming` takes validation, calibration and test from the head of {self.source.name}, "
                f"{count} examples: its first {self.first} of {len(self)} pieces have {have}, and training needs at "
                "least one piece behind them. Lower them (a share in `parts` is of `streaming.examples`), give more "
                "text, or leave `source.streaming` out."
            )
        return TokenExamples.joined(found).selected(np.arange(count)) if found else TokenExamples.from_pairs([])

    def in_order(self) -> Iterator[TokenExamples]:
        """The pieces for training, in the order of the source, once."""
        return (self[number] for number in range(self.first, len(self)))


def hold_out(sources: Sequence[StreamedExamples], count: int) -> Chosen:
    """Take at least `count` examples from the heads of all sources, by their shares. No source trains on one of them.

    Raises:
        UserError: a source has too few examples.
    """
    heads: list[TokenExamples] = []
    known = frozenset[bytes]()
    for source in sources:
        source.held_out = known
        heads.append(source.hold_out(ceil(count * source.share)))
        known = source.held_out
    for source in sources:
        source.held_out = known
    examples = TokenExamples.joined(heads)
    return Chosen(examples, np.arange(len(examples)))


class Place(NamedTuple):
    """A place among the pieces of a source, in the order in which they are read."""

    piece: int = 0
    """Number of pieces before the one that is read now."""
    taken: int = 0
    """Number of its examples that were already taken."""


class PieceReader:
    """Reads the examples of pieces one after the other.

    Args:
        pieces: examples of every piece, from that of the place on.
        place: where to begin.
        a_pass: number of pieces without an example after which there is none to come; None if the pieces have an end.
    """

    def __init__(self, pieces: Iterable[TokenExamples], place: Place, a_pass: int | None = None) -> None:
        self._pieces, self._a_pass = iter(pieces), a_pass
        self._now: TokenExamples | None = None
        self.place = place
        """Where the next example is."""

    def take(self, count: int) -> TokenExamples:
        """The next examples; fewer at the end.

        Raises:
            UserError: a whole pass has no example.
        """
        found: list[TokenExamples] = []
        empty = 0
        while count:
            self._now = next(self._pieces, None) if self._now is None else self._now
            if self._now is None:
                break
            first = self.place.taken
            end = min(first + count, len(self._now))
            empty = 0 if end > first else empty + 1
            if empty == self._a_pass:
                raise UserError("`source.streaming`: no piece of the text has an example for training; give more text.")
            if end > first:
                found.append(self._now.span(first, end))
                count -= end - first
            self.place = self.place._replace(taken=end)
            if end == len(self._now):
                self._now, self.place = None, Place(self.place.piece + 1)
        return TokenExamples.joined(found) if found else TokenExamples.from_pairs([])


class RankOrder:
    """Numbers of the pieces that one rank reads, without end: all pieces for training in a new order in every pass.

    Args:
        pieces: the pieces.
        rank: the rank.
        ranks: number of ranks. They share every pass.
        seed: seed of the order.

    Raises:
        UserError: there are fewer pieces than ranks.
    """

    def __init__(self, pieces: StreamedExamples, rank: int, ranks: int, seed: int) -> None:
        self.first, self.count = pieces.first, len(pieces) - pieces.first
        if self.count < ranks:
            raise UserError(
                f"`source.streaming`: {pieces.source.name} has {self.count} pieces of text for training, and {ranks} "
                "ranks need one each. Give more text, or leave `source.streaming` out."
            )
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self._at = 0

    @property
    def a_pass(self) -> int:
        """Number of pieces that this rank reads in a pass."""
        return len(range(self.rank, self.count, self.ranks))

    def starting_at(self, number: int) -> "RankOrder":
        """The same order without its first pieces."""
        rest = copy(self)
        rest._at = number
        return rest

    def __iter__(self) -> Iterator[int]:
        number, done = divmod(self._at, self.a_pass)
        while True:
            yield from self._pass(number)[done:].tolist()
            number, done = number + 1, 0

    def _pass(self, number: int) -> NDArray[np.int64]:
        order = np.random.default_rng((self.seed, number)).permutation(self.count)
        return self.first + order[self.rank :: self.ranks]
