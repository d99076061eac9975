"""Bad rows: what makes a row unusable, and the errors and warnings about it."""

from collections.abc import Sequence
from typing import Any, Literal

from pdtrim_pl.errors import UserError

OnBadRow = Literal["error", "skip"]
Kind = Literal["text", "pairs", "chat"]

_NAMED = 3
"""Number of skipped rows that a warning names."""


class BadRow(UserError):
    """A row cannot be used. The message gives its place and the reason."""

    @classmethod
    def at(cls, place: str, problem: str) -> "BadRow":
        """The error for the row at `place`."""
        return cls(f"{place}: {problem}; mend or drop the row, or set `source.on_bad_row` to `skip`.")


def check_value(kind: Kind, column: str, value: Any) -> None:
    """Refuse a value that is empty or of the wrong type: chats are lists, everything else is text.

    Raises:
        UserError: the value cannot be used. The message does not give the place of the row.
    """
    wanted = list if kind == "chat" else str
    if not isinstance(value, wanted):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"column `{column}` holds {found}, not a {wanted.__name__}")
    # Raw text may have empty rows, for example between paragraphs.
    if kind != "text" and not (value.strip() if isinstance(value, str) else value):
        raise UserError(f"column `{column}` is empty")


def skipped_rows(skipped: Sequence[str], total: int) -> str:
    """The warning that says how many rows were left out, and names the first ones.

    Args:
        skipped: place and problem of each row that was left out.
        total: number of rows of the source.

    Raises:
        UserError: no row is left.
    """
    if len(skipped) == total:
        raise UserError(f"`source.path`: every row is bad, {total} of {total}: {_first(skipped)}")
    return named_rows(skipped, total)


def named_rows(skipped: Sequence[str], total: int) -> str:
    """The same warning, for rows that may be all of a piece of a source."""
    return f"`source.on_bad_row` is `skip`: {len(skipped)} of {total} rows are left out: {_first(skipped)}"


def _first(skipped: Sequence[str]) -> str:
    return "; ".join(skipped[:_NAMED]) + ("; ..." if len(skipped) > _NAMED else ".")


def damaged(reason: Exception | str) -> UserError:
    """The error for a file that cannot be split into rows."""
    return UserError(f"`source.path`: {reason}; mend the file.")


def empty(origin: str) -> UserError:
    """The error for a source without rows."""
    return UserError(f"`source.path`: {origin} is empty; give a source with at least one row.")
