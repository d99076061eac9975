"""The retention rule of one block: which prompt positions it sends, and how they are encoded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any, Literal, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.codec import NO_CODEC, Codec

Keep = Literal["all", "first_last"]


@dataclass(frozen=True, eq=False)
class Retention:
    """What one block sends: every prompt position, or the first and the last ones, encoded with a codec.

    Integers in `first` and `last` are numbers of tokens. Floats in (0, 1] are shares of the prompt, rounded up. A share
    is taken as its decimal digits, without binary rounding error: 0.07 of 100 tokens is 7, not 8.

    Raises:
        UserError: a count or share out of range, or a rule that keeps nothing.
    """

    keep: Keep = "all"
    first: int | float = 0
    last: int | float = 0
    codec: Codec = NO_CODEC
    """How keys and values of these positions are encoded."""

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise UserError(f"`keep` is {self.keep!r}, not one of {', '.join(get_args(Keep))}.")
        for name, value in (("first", self.first), ("last", self.last)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            share = isinstance(value, float) and 0.0 < value <= 1.0
            if not whole and not share:
                raise UserError(
                    f"`{name}` is {value!r}: give a number of tokens (an integer >= 0) or a share of the prompt "
                    "(a float in (0, 1])."
                )
        if self.keep == "all" and (self.first or self.last):
            raise UserError("`first` and `last` belong to `keep: first_last`, not to `keep: all`.")
        if self.keep == "first_last" and not (self.first or self.last):
            raise UserError("`keep: first_last` with `first: 0` and `last: 0` would send nothing: raise one of them.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retention) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _parts(self) -> tuple[object, ...]:
        """Fields that equality compares. Types are among them: the count 1 and the share 1.0 are different rules."""
        return self.keep, type(self.first), self.first, type(self.last), self.last, self.codec

    def counts(self, positions: int) -> tuple[int, int]:
        """Number of first and number of last positions that are sent, out of `positions`. They never overlap."""
        if self.keep == "all":
            return positions, 0
        first = min(_tokens(self.first, positions), positions)
        return first, min(_tokens(self.last, positions), positions - first)

    def kept(self, positions: int) -> int:
        """Number of positions that are sent, out of `positions`."""
        return sum(self.counts(positions))

    def to_json(self) -> dict[str, Any]:
        """The rule's keys in `kv_policy.json`. A share of 1.0 becomes `all`: some JSON readers take 1.0 for a count."""
        codec = {} if self.codec.is_none else {"codec": self.codec.to_json()}
        if self.keep == "all" or 1.0 in [v for v in (self.first, self.last) if isinstance(v, float)]:
            return {"keep": "all", **codec}
        return {"keep": self.keep, "first": self.first, "last": self.last, **codec}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Retention:
        """Read the keys of a rule and ignore other keys.

        Raises:
            UserError: a value out of range.
            KeyError: `keep` is missing.
        """
        codec = Codec.from_json(data["codec"]) if "codec" in data else NO_CODEC
        return cls(data["keep"], data.get("first", 0), data.get("last", 0), codec)

    @property
    def is_whole(self) -> bool:
        """Whether every position is sent, in the element type of the cache."""
        return self.keep == "all" and self.codec.is_none

    def bytes_sent(self, positions: int, heads: int, width: int, element_bytes: int) -> int:
        """Bytes sent of one row, if prefill handled `positions` of it; other arguments as of `Codec.row_bytes`."""
        return self.codec.row_bytes(self.kept(positions), heads, width, element_bytes)

    def written_as(self, codec: Codec) -> Retention:
        """The same positions, encoded with another codec."""
        return replace(self, codec=codec)


KEEP_ALL = Retention()


def _tokens(value: int | float, positions: int) -> int:
    return value if isinstance(value, int) else ceil(Fraction(repr(value)) * positions)
