"""Reads the data of offline task files. Task files name `rows_of_file` by its import path; it needs no harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "PDTRIM_DATA"
"""Environment variable: the folder that holds the data of the task files."""


def rows_of_file(*, file: str, **_: object) -> dict[str, Dataset]:
    """The split `test` of a task: a JSON file with one row a line.

    Args:
        file: path inside the folder that `DATA_VARIABLE` names.
        _: the harness also passes the metadata of the task.

    Raises:
        UserError: the variable is not set, or there is no such file.
    """
    from datasets import Dataset

    folder = os.environ.get(DATA_VARIABLE)
    if folder is None:
        raise UserError(f"This task reads {file} from a folder of yours: set the variable {DATA_VARIABLE} to it.")
    path = Path(folder) / file
    if not path.is_file():
        raise UserError(f"There is no {path}: {DATA_VARIABLE} is {folder}, and this task reads {file} in it.")
    return {"test": Dataset.from_json(str(path))}
