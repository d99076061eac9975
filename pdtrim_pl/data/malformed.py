"""Finds what is wrong in a JSON file that did not load, so that the message can name the line."""

import json
from itertools import count
from pathlib import Path


def data_lines(path: Path) -> list[int]:
    """The line numbers (from 1) of the rows of a JSON Lines file, blank lines left out."""
    with path.open(encoding="utf-8") as lines:
        return [number for number, line in zip(count(1), lines, strict=False) if line.strip()]


def find_json_fault(path: Path) -> str | None:
    """Look for the first fault of a .json or .jsonl file.

    Returns:
        The file, the line and what is wrong there; None if every row is an object with the same columns.
    """
    try:
        if path.suffix == ".jsonl":
            return _find_line_fault(path)
        json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8 ({error})"
    except json.JSONDecodeError as error:
        return _find_line_fault(path) if error.msg == "Extra data" else f"{path}, line {error.lineno}: {error.msg}"
    return None


def _find_line_fault(path: Path) -> str | None:
    first: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in zip(count(1), lines, strict=False):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
            if not isinstance(row, dict):
                return f"{path}, line {number}: holds a {type(row).__name__}, not an object"
            for column, value in row.items():
                found = type(value).__name__
                if value is not None and first.setdefault(column, found) != found:
                    return f"{path}, line {number}: column `{column}` holds {found}, earlier lines {first[column]}"
    return None
