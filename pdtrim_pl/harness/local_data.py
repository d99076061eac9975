"""Reads the data of offline task files. Task files name its functions by their import paths; it needs no harness."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_pl.data.files import read_lines
from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "PDTRIM_DATA"
"""Environment variable: the folder that holds the data of the task files."""
TITLE = re.compile(r"^ = (?!=).*(?<!=) = ?$", re.MULTILINE)
"""The first line of an article in WikiText."""


def rows_of_file(*, file: str, columns: Sequence[str] = (), **_: object) -> dict[str, Dataset]:
    """The split `test` of a task: a JSON file, usually with one row a line.

    Args:
        file: path inside the folder that `DATA_VARIABLE` names; a pattern such as `boolq/*.jsonl` must fit one file.
        columns: what every row must have.
        _: the harness also passes the metadata of the task.

    Raises:
        UserError: the variable is not set, there is no such file or several, or a row lacks a column.
    """
    return _as_test_split(_rows(_file(file), columns))


def rows_with_examples(
    *, file: str, examples_file: str, by: str, examples: int, columns: Sequence[str] = (), **_: object
) -> dict[str, Dataset]:
    """`rows_of_file` with a column `examples`: solved questions of the same kind, as the text before a question.

    Args:
        file: see `rows_of_file`.
        examples_file: the solved questions: `context`, `choices` and `label`; like `file`.
        by: column that both files have; a question gets examples with the same value.
        examples: number of examples of a question, from the start of the file.
        columns: see `rows_of_file`.

    Raises:
        UserError: as `rows_of_file`.
    """
    solved: dict[Any, list[str]] = {}
    for row in _rows(_file(examples_file), ("context", "choices", "label", by)):
        answer = row["choices"][row["label"]]
        solved.setdefault(row[by], []).append(f"{row['context']} {answer}\n\n")
    rows = _rows(_file(file), (*columns, by))
    return _as_test_split([{**row, "examples": "".join(solved.get(row[by], [])[:examples])} for row in rows])


def pages_of_text(*, file: str, **_: object) -> dict[str, Dataset]:
    """The split `test` of a task on WikiText's raw text: a row `page` for each article.

    Args:
        file: see `rows_of_file`.
        _: the harness also passes the metadata of the task.

    Raises:
        UserError: as `rows_of_file`, or the text has no title line ` = ... = `.
    """
    path = _file(file)
    text = path.read_text(encoding="utf-8")
    starts = [found.start() for found in TITLE.finditer(text)]
    if not starts:
        raise UserError(f"{path} has no line ` = Title = `: give WikiText's raw text.")
    ends = [*starts[1:], len(text)]
    return _as_test_split([{"page": text[start:end]} for start, end in zip(starts, ends, strict=True)])


def _file(name: str) -> Path:
    folder = os.environ.get(DATA_VARIABLE)
    if folder is None:
        raise UserError(f"This task reads {name} from a folder of yours: set the variable {DATA_VARIABLE} to it.")
    found = [Path(path) for path in sorted(glob(name, root_dir=folder)) if (Path(folder) / path).is_file()]
    if not found:
        raise UserError(
            f"There is no {Path(folder) / name}: {DATA_VARIABLE} is {folder}, and this task reads {name} in it."
        )
    if len(found) > 1:
        raise UserError(
            f"This task reads one file {name}, and {DATA_VARIABLE}={folder} has {', '.join(map(str, found))}: keep "
            "the one to be scored in a folder of its own."
        )
    return Path(folder) / found[0]


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for line in read_lines(path):
        missing = [name for name in columns if name not in line.row]
        if line.fault is not None or missing:
            fault = line.fault or f"has no {', '.join(missing)} (it has {', '.join(line.row) or 'nothing'})"
            raise UserError(f"{path}, {line.place}: {fault}.")
        rows.append(line.row)
    if not rows:
        raise UserError(f"{path} has no row.")
    return rows


def _as_test_split(rows: list[dict[str, Any]]) -> dict[str, Dataset]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
