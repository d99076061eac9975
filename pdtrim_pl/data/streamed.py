"""The examples of a source that is larger than memory, piece by piece; those at its head are held out."""

from collections.abc import Iterator
from dataclasses import dataclass, field

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
    """

    source: PiecedSource
    tokenizer: PreTrainedTokenizerBase
    lengths: Lengths
    seed: int
    vocab_size: int | None
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

    def hold_out(self, count: int) -> Chosen:
        """Read the head: as many pieces as give `count` examples. Training begins behind them.

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
                f"`source.streaming` takes validation, calibration and test from the head of the source, {count} "
                f"examples: its first {self.first} of {len(self)} pieces have {have}, and training needs at least one "
                "piece behind them. Lower them (a share in `parts` is of `streaming.examples`), give more text, or "
                "leave `source.streaming` out."
            )
        examples = TokenExamples.joined(found) if found else TokenExamples.from_pairs([])
        return Chosen(examples, np.arange(have))

    def in_order(self) -> Iterator[TokenExamples]:
        """The pieces for training, in the order of the source, once."""
        return (self[number] for number in range(self.first, len(self)))


class RankOrder:
    """Numbers of the pieces that one rank reads, without end: all pieces for training in a new order in every pass.

    Args:
        pieces: the pieces.
        rank: the rank.
        ranks: number of ranks. They share every pass.
        seed: seed of the order.
        at: how many pieces to leave out at the start.

    Raises:
        UserError: there are fewer pieces than ranks.
    """

    def __init__(self, pieces: StreamedExamples, rank: int, ranks: int, seed: int, at: int = 0) -> None:
        self.first, self.count = pieces.first, len(pieces) - pieces.first
        if self.count < ranks:
            raise UserError(
                f"`source.streaming`: the source has {self.count} pieces of text for training, and {ranks} ranks need "
                "one each. Give more text, or leave `source.streaming` out."
            )
        self.rank, self.ranks, self.seed, self.at = rank, ranks, seed, at

    @property
    def a_pass(self) -> int:
        """Number of pieces that this rank reads in a pass."""
        return len(range(self.rank, self.count, self.ranks))

    def __iter__(self) -> Iterator[int]:
        number, done = divmod(self.at, self.a_pass)
        while True:
            yield from self._pass(number)[done:].tolist()
            number, done = number + 1, 0

    def _pass(self, number: int) -> NDArray[np.int64]:
        order = np.random.default_rng((self.seed, number)).permutation(self.count)
        return self.first + order[self.rank :: self.ranks]
