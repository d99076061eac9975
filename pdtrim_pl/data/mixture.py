"""Several sources in one data set, each with a share of the examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdtrim_pl.data.examples import TokenExamples
from pdtrim_pl.data.sources import TextSource
from pdtrim_pl.errors import UserError


@dataclass(frozen=True)
class MixedIn:
    """A source that is mixed into the main one.

    Raises:
        UserError: the share is out of range.
    """

    source: TextSource
    share: float
    """Share of all examples that come from this source, between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"`mixed_in` has the share {self.share}: give a number between 0 and 1.")


def check_shares(mixed_in: Sequence[MixedIn]) -> None:
    """Refuse sources that leave nothing to the main one.

    Raises:
        UserError: their shares add up to 1 or more.
    """
    if (total := sum(each.share for each in mixed_in)) >= 1:
        raise UserError(f"The shares of `mixed_in` add up to {total:g}, and `source` needs some: lower them.")


class Chosen(NamedTuple):
    """Some of a source's examples, without duplicates."""

    examples: TokenExamples
    rows: NDArray[np.int64]
    """Indices of the chosen ones."""


def mixture(examples: Sequence[TokenExamples], shares: Sequence[float], seed: int) -> Chosen:
    """The examples of all sources, and as many of them as the shares allow, no example twice.

    An example that several sources have belongs to the first of them. The source that has the fewest examples for its
    share sets the number; of the others a seeded choice is taken.

    Args:
        examples: those of every source.
        shares: share of each source in the result; they add up to 1.
        seed: seed of the choice.

    Raises:
        UserError: a source has too few examples.
    """
    together = TokenExamples.joined(examples)
    ends = np.cumsum([len(each) for each in examples])
    kept = np.asarray(together.distinct())
    distinct = np.split(kept, np.searchsorted(kept, ends[:-1]))
    total = min(int(len(each) / share) for each, share in zip(distinct, shares, strict=True))
    counts = [round(total * share) for share in shares]
    if 0 in counts:
        raise UserError(
            f"`mixed_in`: the sources have {', '.join(str(len(each)) for each in examples)} examples, too few for one "
            f"of each at these shares. Without duplicates: {', '.join(str(len(each)) for each in distinct)}. Give more "
            "text, or other shares."
        )
    draws = np.random.default_rng(seed)
    chosen = [np.sort(draws.permutation(each)[:count]) for each, count in zip(distinct, counts, strict=True)]
    return Chosen(together, np.concatenate(chosen))
