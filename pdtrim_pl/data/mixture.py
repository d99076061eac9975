"""Several sources in one data set, each with a share of the examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def mixture(examples: Sequence[TokenExamples], shares: Sequence[float], seed: int) -> TokenExamples:
    """As many examples as the shares allow, no example twice.

    The source that has the fewest examples for its share sets the number; of the others a seeded choice is taken.

    Args:
        examples: those of every source.
        shares: share of each source in the result; they add up to 1.
        seed: seed of the choice.

    Raises:
        UserError: a source has too few examples.
    """
    distinct = [np.asarray(each.distinct()) for each in examples]
    total = min(int(len(each) / share) for each, share in zip(distinct, shares, strict=True))
    counts = [round(total * share) for share in shares]
    if 0 in counts:
        raise UserError(
            f"`mixed_in`: the sources have {', '.join(str(len(each)) for each in distinct)} examples, too few for one "
            "of each at these shares. Give more text, or other shares."
        )
    draws = np.random.default_rng(seed)
    chosen = [np.sort(draws.permutation(each)[:count]) for each, count in zip(distinct, counts, strict=True)]
    return TokenExamples.joined([each.selected(rows) for each, rows in zip(examples, chosen, strict=True)])
