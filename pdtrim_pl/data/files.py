"""Read JSON, JSON Lines and text files row by row. Every row carries its place in the file, for error messages."""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from pdtrim_pl.errors import UserError

JSON_ENDINGS = (".json", ".jsonl")
TEXT_ENDINGS = (".txt", ".raw", ".text")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Line:
    """One row of a file, or the reason why it cannot be read."""

    place: str
    """`line 3`, or `line 1, row 10` in an array, or `row 1`. Numbers start at 1."""
    row: dict[str, Any]
    """Column -> value; empty if the row cannot be read."""
    fault: str | None = None
    """Why the row cannot be read; None if it can."""


def ending(path: Path) -> str:
    """The ending that decides how a file is read: `.jsonl` for `a.jsonl.gz`, but `.gz` for `a.parquet.gz`."""
    inner = Path(path.name.removesuffix(".gz")).suffix
    return inner if inner in (*JSON_ENDINGS, *TEXT_ENDINGS) else path.suffix


def read_lines(path: Path) -> Iterator[Line]:
    """Read a file whose ending is in `JSON_ENDINGS` or `TEXT_ENDINGS`, possibly followed by `.gz`.

    A JSON file holds one object per line, or one array of objects. Its content decides which, not its ending. A string
    in an array becomes a row with the column `text`. A text file is one row with the column `text`.

    Raises:
        UserError: the file cannot be read or split into rows. The message names the file and the line.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if ending(path) not in TEXT_ENDINGS:
                yield from _json(path, file)
            elif data := file.read():
                _refuse_wide(path, data)
                yield from read_text("row 1", data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_prompts(path: Path) -> list[tuple[str, str | list[Any]]]:
    """The rows of a file of prompts: the place of each, and its `prompt`, or else its `messages`.

    Raises:
        UserError: there is no row, or one of them has neither. The message names the place.
    """
    found: list[tuple[str, str | list[Any]]] = []
    for line in read_lines(path):
        place, prompt, messages = f"{path}, {line.place}", line.row.get("prompt"), line.row.get("messages")
        if isinstance(prompt, str) and prompt:
            found.append((place, prompt))
        elif isinstance(messages, list) and messages:
            found.append((place, messages))
        else:
            raise UserError(f"{place}: {line.fault or 'has neither a `prompt` nor `messages`'}.")
    if not found:
        raise UserError(f"{path} has no row: give rows with `prompt` or `messages`.")
    return found


def check_lines(path: Path) -> None:
    """Refuse a file that cannot be read from its middle.

    Raises:
        UserError: it is an array of JSON, or in UTF-16. The message names the file.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    _refuse_wide(path, head)
    if ending(path) in JSON_ENDINGS and head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        raise UserError(
            f"`source.streaming` reads files from their middle, and {path} is one array: write one row a line."
        )


def lines_between(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that begin in a span of bytes, each with the place of its first byte. Blank ones too."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that began before
        at = file.tell()
        while at < end and (line := file.readline()):
            yield at, line
            at += len(line)


def read_text(place: str, data: bytes) -> Iterator[Line]:
    """The one row of a text, or none if it is empty."""
    try:
        text = data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        yield Line(_line_of(data, error), {}, _not_utf8(error))
    else:
        if text:
            yield Line(place, {"text": text})


def _json(path: Path, file: BufferedIOBase) -> Iterator[Line]:
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.removeprefix(BOM_UTF8).strip())
    first, head = next(lines, (1, b""))
    _refuse_wide(path, head)
    if head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        yield from _array(path, b"\n" * (first - 1) + head.removeprefix(BOM_UTF8) + file.read())
    elif head:
        for number, line in chain([(first, head)], lines):
            yield read_object(f"line {number}", line)


def read_object(place: str, line: bytes) -> Line:
    """The row in one line of JSON."""
    try:
        return _row(place, json.loads(line.removeprefix(BOM_UTF8).decode()))
    except UnicodeDecodeError as error:
        return Line(place, {}, _not_utf8(error))
    except json.JSONDecodeError as error:
        return Line(place, {}, f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or too many nested brackets
        return Line(place, {}, f"not readable as JSON ({error})")


def _array(path: Path, data: bytes) -> Iterator[Line]:
    """The rows of an array. They are decoded one by one, to know the line of each."""
    at, line, number = 0, 1, 0
    try:
        text = data.decode()
        for start, value in _elements(text):
            line, at, number = line + text.count("\n", at, start), start, number + 1
            yield _row(f"line {line}, row {number}", {"text": value} if isinstance(value, str) else value)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, {_line_of(data, error)}: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, behind row {number}: not readable as JSON ({error})") from error


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """The start of each element of an array in `text`, and its value."""
    decoder = json.JSONDecoder()
    at = _after_space(text, text.index("[") + 1)
    ended = text[at : at + 1] == "]"
    while not ended:
        value, end = decoder.raw_decode(text, at)
        yield at, value
        at = _after_space(text, end)
        ended = text[at : at + 1] == "]"
        if not ended:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting a comma or the end of the array", text, at)
            comma, at = at, _after_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("A comma before the end of the array", text, comma)
    if (rest := _after_space(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Something follows the array", text, rest)


def _row(place: str, value: Any) -> Line:
    if isinstance(value, dict):
        return Line(place, value)
    return Line(place, {}, f"holds a {type(value).__name__}, not an object")


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None
    return found.end()


def _line_of(data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    return f"line {line}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x})"


def _refuse_wide(path: Path, data: bytes) -> None:
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise UserError(f"{path} cannot be read: its encoding is utf-16 or utf-32; save it as utf-8")
