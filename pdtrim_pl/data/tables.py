"""Read a JSON or text file as a `datasets.Dataset`. The result is cached on disk until the file changes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray

from pdtrim_pl.data.files import TEXT_ENDINGS, Line, ending, read_lines
from pdtrim_pl.data.malformed import BadRow, Kind, OnBadRow, check_value, damaged, empty, skipped_rows
from pdtrim_pl.errors import UserError

PLACE = "place of the row"
"""Name of the column in `Table.places`."""
FAULT = "fault of the row"
"""Name of the column that says why a row is bad; null for a good row."""
_ROWS_TO_INSPECT = 1000
"""Number of good rows whose keys make up the columns of a file."""
_FORMAT = 1
"""Part of the cache key. Raise it when files are read in another way, so that old caches are not used."""


class Table(NamedTuple):
    """The usable rows of a file."""

    dataset: Dataset
    """Columns of strings. A chat is JSON text, since Arrow would give every message the keys of all others."""
    places: Dataset
    """Place of each row in the file, in the column `PLACE`."""
    skipped: Sequence[str]
    """Place and problem of each row that was left out."""


def column_names(path: Path) -> list[str]:
    """The keys of the first 1000 good rows of a file.

    Raises:
        UserError: the file is empty, damaged, or has no good row.
    """
    faults: list[str] = []
    names: dict[str, None] = {}
    usable = 0
    try:
        for line in read_lines(path):
            if line.fault is None:
                names |= dict.fromkeys(line.row)
                usable += 1
                if usable == _ROWS_TO_INSPECT:
                    break
            else:
                faults.append(f"{path}, {line.place}: {line.fault}")
    except ValueError as error:
        raise damaged(error) from error
    if not usable and not faults:
        raise empty(str(path))
    if ending(path) in TEXT_ENDINGS:
        return ["text"]
    if not usable:
        skipped_rows(faults, len(faults))
    return list(names)


def read_table(path: Path, kind: Kind, columns: Sequence[str], on_bad_row: OnBadRow) -> Table:
    """Read some columns of a file.

    Raises:
        UserError: the file is damaged.
        BadRow: a row is bad, and `on_bad_row` is `error`.
    """
    file = path.stat()
    settings = {"path": str(path), "kind": kind, "columns": tuple(columns), "on_bad_row": on_bad_row}
    try:
        table = Dataset.from_generator(
            _string_rows,
            features=Features({name: Value("string") for name in (*columns, PLACE, FAULT)}),
            gen_kwargs={**settings, "key": (_FORMAT, file.st_mtime_ns, file.st_size)},
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, BadRow | OSError):
            raise cause from error
        if isinstance(cause, ValueError):
            raise damaged(cause) from error
        raise
    bad = bad_rows(table)
    skipped = [f"{path}, {table[row][PLACE]}: {table[row][FAULT]}" for row in bad.nonzero()[0].tolist()]
    if skipped:
        table = table.select((~bad).nonzero()[0])
    return Table(table.select_columns(list(columns)), table.select_columns([PLACE]), skipped)


def bad_rows(table: Dataset) -> NDArray[np.bool_]:
    """Which rows are bad (have a text in the column `FAULT`), bool [rows]."""
    return table.select_columns([FAULT]).with_format("arrow")[:][FAULT].is_valid().to_numpy()


def _string_rows(
    path: str, kind: Kind, columns: tuple[str, ...], on_bad_row: OnBadRow, key: tuple[int, ...]
) -> Iterator[dict[str, str | None]]:
    """Rows of a file. `key` only changes the cache key of `Dataset.from_generator`."""
    yield from string_rows(read_lines(Path(path)), path, kind, columns, on_bad_row)


def string_rows(
    lines: Iterable[Line], origin: str, kind: Kind, columns: Sequence[str], on_bad_row: OnBadRow
) -> Iterator[dict[str, str | None]]:
    """Some columns of rows as text, with `PLACE` and `FAULT`. A chat becomes JSON text.

    Raises:
        BadRow: a row is bad, and `on_bad_row` is `error`. `origin` is the name of its file.
    """
    for line in lines:
        try:
            if line.fault is not None:
                raise UserError(line.fault)
            values = {column: _string(kind, column, line.row.get(column)) for column in columns}
        except ValueError as error:
            if on_bad_row == "error":
                raise BadRow.at(f"{origin}, {line.place}", str(error)) from error
            yield {**dict.fromkeys(columns), PLACE: line.place, FAULT: str(error)}
        else:
            yield {**values, PLACE: line.place, FAULT: None}


def _string(kind: Kind, column: str, value: Any) -> str:
    check_value(kind, column, value)
    text = json.dumps(value, ensure_ascii=False, default=str) if kind == "chat" else value
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise UserError(f"column `{column}` holds half of a character ({half})") from error
    return text
