"""The rows of a source, with the place of each for messages."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from pdtrim_pl.data.malformed import BadRow, Kind, OnBadRow
from pdtrim_pl.data.settings import Turns
from pdtrim_pl.data.tables import PLACE


@dataclass(frozen=True)
class Part:
    """The rows of one file or dataset."""

    origin: str
    dataset: Dataset
    kind: Kind
    columns: Sequence[str]
    places: Dataset | None = None
    """Place of each row in its file, in the column `PLACE`; None if the number of the row is its place."""
    skipped: Sequence[str] = ()
    """Place and problem of every row that was left out."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source, with their kind and their origin."""

    dataset: Dataset
    """Columns of strings. A chat is stored as the JSON text of its messages."""
    parts: Sequence[Part]
    on_bad_row: OnBadRow = "error"
    turns: Turns = "last"
    turn_weights: Sequence[float] = (1.0,)

    @property
    def kind(self) -> Kind:
        """The kind of the rows: `text`, `pairs` or `chat`."""
        return self.parts[0].kind

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are read: one for a text or a chat, prompt and response for pairs."""
        return self.parts[0].columns

    @property
    def skipped(self) -> list[str]:
        """Place and problem of every row that was left out while reading."""
        return [row for part in self.parts for row in part.skipped]

    def where(self, row: int) -> str:
        """Place of row `row` (from 0), for messages: `data.jsonl, line 3` or `org/data, row 3` (from 1)."""
        for part in self.parts:
            if row < len(part.dataset):
                place = f"row {row + 1}" if part.places is None else part.places[row][PLACE]
                return f"{part.origin}, {place}"
            row -= len(part.dataset)
        raise AssertionError("a row beyond the end of its source")

    def refuse(self, row: int, problem: Exception | str) -> str:
        """Raise `BadRow` for row `row`, or return the problem as text if bad rows are skipped."""
        if self.on_bad_row == "error":
            raise BadRow.at(self.where(row), str(problem))
        return str(problem)
