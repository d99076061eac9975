"""Cut a source that is larger than memory into pieces, each of which can be read without the others.

A piece is about a megabyte of a file of lines, a row group of a Parquet file, or a thousand rows of a saved dataset. So
ranks, workers and a run that continues go straight to their pieces, and no file is read from its start.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset
from pyarrow import ArrowException

from pdtrim_pl.data.files import TEXT_ENDINGS, Line, check_lines, ending, lines_between, read_object, read_text
from pdtrim_pl.data.malformed import damaged
from pdtrim_pl.data.rows import Part, Rows
from pdtrim_pl.data.sources import EMBEDDED_TEXT, TextSource, columns_of, files_of, load_saved
from pdtrim_pl.data.tables import FAULT, PLACE, column_names, string_rows
from pdtrim_pl.errors import UserError

PIECE_BYTES = 2**20
"""A piece of a file of lines has the lines that begin in as many bytes."""
PIECE_ROWS = 1000
"""Rows of a saved dataset in a piece."""


@dataclass(frozen=True)
class Piece:
    """Where a piece is: bytes of a file of lines, rows of a saved dataset, or the number of a row group."""

    path: Path
    start: int
    end: int


class PiecedSource:
    """A source whose rows are read piece by piece.

    Args:
        source: a file, a glob of files, or a directory written by `save_to_disk`.

    Raises:
        UserError: the source is missing or malformed, cannot be read in pieces, or its columns do not tell what a row
            is.
    """

    def __init__(self, source: TextSource) -> None:
        self.source = source
        path = Path(source.path).expanduser()
        self._saved = path if path.is_dir() else None
        self.files = [path] if path.is_dir() else _files(source)
        self.kind, self.columns = columns_of(source, str(self.files[0]), self._column_names())
        self.pieces = [piece for file in self.files for piece in self._cut(file)]

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def name(self) -> str:
        """The path of the source."""
        return self.source.path

    def rows(self, number: int) -> Rows:
        """The rows of one piece. Bad rows are refused, or left out, as the source says.

        Raises:
            UserError: the piece cannot be read.
        """
        piece, source = self.pieces[number], self.source
        found: dict[str, list[Any]] = {name: [] for name in (*self.columns, PLACE)}
        skipped = []
        for row in string_rows(self._lines(piece), str(piece.path), self.kind, self.columns, source.on_bad_row):
            if row[FAULT] is not None:
                skipped.append(f"{piece.path}, {row[PLACE]}: {row[FAULT]}")
                continue
            for name, values in found.items():
                values.append(row[name])
        places = Dataset.from_dict({PLACE: found.pop(PLACE)})
        part = Part(str(piece.path), Dataset.from_dict(found), self.kind, self.columns, places, skipped)
        return Rows(part.dataset, [part], source.on_bad_row, source.turns, source.turn_weights)

    @cached_property
    def _dataset(self) -> Dataset:
        assert self._saved is not None
        return load_saved(self.source, self._saved)

    def _column_names(self) -> Sequence[str]:
        first = self.files[0]
        if self._saved is not None:
            return self._dataset.column_names
        if ending(first) == ".parquet":
            return list(_opened(first).schema_arrow.names)
        return ["text"] if ending(first) in TEXT_ENDINGS else column_names(first)

    def _cut(self, file: Path) -> list[Piece]:
        if self._saved is not None:
            end, size = len(self._dataset), PIECE_ROWS
        elif ending(file) == ".parquet":
            end, size = _opened(file).num_row_groups, 1
        else:
            check_lines(file)
            end, size = file.stat().st_size, PIECE_BYTES
        return [Piece(file, start, min(start + size, end)) for start in range(0, end, size)]

    def _lines(self, piece: Piece) -> Iterator[Line]:
        if self._saved is not None:
            first = piece.start
            table = self._dataset.select_columns(list(self.columns))[piece.start : piece.end]
        elif ending(piece.path) == ".parquet":
            first, table = _row_group(piece, self.columns)
        elif ending(piece.path) in TEXT_ENDINGS:
            lines = list(lines_between(piece.path, piece.start, piece.end))
            yield from read_text(f"text at byte {lines[0][0]}", b"".join(line for _, line in lines)) if lines else ()
            return
        else:
            for at, line in lines_between(piece.path, piece.start, piece.end):
                if line.strip():
                    yield read_object(f"line at byte {at}", line)
            return
        for row, values in enumerate(zip(*table.values(), strict=True), start=first + 1):
            yield Line(f"row {row}", dict(zip(table, values, strict=True)))


def _files(source: TextSource) -> list[Path]:
    if source.path == EMBEDDED_TEXT:
        raise UserError(f"`source.streaming`: `{EMBEDDED_TEXT}` is small; leave `source.streaming` out.")
    files = files_of(source)
    if not files:
        raise UserError(
            f"`source.streaming` reads files, and {source.path!r} is none. Download a Hub dataset (`hf download "
            "--repo-type dataset`) and give a glob of its files, or leave `source.streaming` out."
        )
    for file in files:
        if file.suffix == ".gz":
            raise UserError(f"`source.streaming` reads files from their middle, and {file} is packed: unpack it.")
    return files


def _opened(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise damaged(f"{file}: {error}") from error


def _row_group(piece: Piece, columns: Sequence[str]) -> tuple[int, dict[str, list[Any]]]:
    """Number of rows before a row group, and some of its columns."""
    with _opened(piece.path) as file:
        first = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        try:
            return first, file.read_row_group(piece.start, columns=list(columns)).to_pydict()
        except (ArrowException, OSError) as error:
            raise damaged(f"{piece.path}: {error}") from error
