"""Where text comes from: the embedded text, files, saved datasets and the Hub, all as one `datasets.Dataset`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from pdtrim_pl.data.malformed import data_lines, find_json_fault

Kind = Literal["text", "pairs", "chat"]

EMBEDDED_TEXT = "pydoc"
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".raw": "text",
    ".text": "text",
}
_USUAL: list[tuple[Kind, list[str]]] = [("text", ["text"]), ("pairs", ["prompt", "response"]), ("chat", ["messages"])]
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class TextSource:
    """A source of text. Which columns are given says what a row is: a text, a prompt with its response, or a chat.

    With no column given, `text`, `prompt` with `response`, or `messages` is taken if exactly one of the three is there.
    """

    path: str = EMBEDDED_TEXT
    """`pydoc` for the Python Language Reference inside every CPython; a .json, .jsonl, .parquet, .txt, .raw or .text
    file, or a glob of such; a directory written by `save_to_disk`; or a Hub id."""
    name: str | None = None
    """The configuration of a Hub dataset."""
    split: str = "train"
    """The split of a Hub or saved dataset."""
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    """A column of chats: lists of `{role, content}`, turned to text by the tokenizer's chat template. The last
    assistant message is the response, all before it the prompt."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"`source.path` is empty; give a file, a Hub id or `{EMBEDDED_TEXT}`.")
        if (self.prompt_column is None) != (self.response_column is None):
            given = "prompt_column" if self.response_column is None else "response_column"
            raise ValueError(
                f"`source.{given}` is set alone; pairs need both `source.prompt_column` and `source.response_column`."
            )
        given_kinds = [self.text_column, self.prompt_column, self.messages_column]
        if sum(column is not None for column in given_kinds) > 1:
            raise ValueError(
                "`source.text_column`, `source.prompt_column` with `source.response_column`, and "
                "`source.messages_column` exclude each other; give one of the three."
            )


@dataclass(frozen=True)
class Rows:
    """The rows of a source, what they are, and where each came from."""

    dataset: Dataset
    kind: Kind
    columns: Sequence[str]
    """The columns that are read: one for a text or a chat, prompt and response for pairs."""
    origins: Sequence[tuple[str, int]]
    """(file or dataset, count of rows), in row order."""

    def where(self, row: int) -> str:
        """Name the place of row `row` (from 0) for a message: `data.jsonl, line 3` or `org/data, row 3`, from 1."""
        for origin, count in self.origins:
            if row < count:
                if Path(origin).suffix == ".jsonl":
                    return f"{origin}, line {data_lines(Path(origin))[row]}"
                return f"{origin}, row {row + 1}"
            row -= count
        raise AssertionError("a row beyond the end of its source")


def load_rows(source: TextSource) -> Rows:
    """Read a source.

    Raises:
        ValueError: The source is missing, empty or malformed, or its columns do not say what its rows are; the message
            names the file, the line and the column.
    """
    parts = _load(source)
    for origin, dataset in parts:
        if len(dataset) == 0:
            raise _empty(origin)
    resolved = [(origin, dataset, *_columns(source, origin, dataset)) for origin, dataset in parts]
    _, _, kind, columns = resolved[0]
    for origin, _, *found in resolved[1:]:
        if found != [kind, columns]:
            raise ValueError(f"`source.path`: {origin} has other columns than {parts[0][0]}; name the columns to read.")
    tables = [dataset.select_columns(columns) for _, dataset in parts]
    origins = [(origin, len(dataset)) for origin, dataset in parts]
    return Rows(tables[0] if len(tables) == 1 else concatenate_datasets(tables), kind, columns, origins)


def _load(source: TextSource) -> list[tuple[str, Dataset]]:
    """The source as (where it came from, dataset) pairs: one per file, else one."""
    if source.path == EMBEDDED_TEXT:
        documents = [topics[topic] for topic in sorted(topics)]
        return [(EMBEDDED_TEXT, Dataset.from_dict({"text": documents}))]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return [(str(path), _load_saved(source, path))]
    if path.is_file():
        return [_load_file(path)]
    if files := sorted(glob(str(path), recursive=True)):
        return [_load_file(Path(file)) for file in files]
    if path.suffix not in _BUILDERS and _HUB_ID.fullmatch(source.path):
        return [(source.path, _load_hub(source))]
    raise ValueError(f"`source.path`: no file matches {source.path!r}; check the path.")


def _load_file(path: Path) -> tuple[str, Dataset]:
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise ValueError(
            f"`source.path`: {path} has an unknown ending; files are read by theirs: {', '.join(sorted(_BUILDERS))}."
        )
    if path.stat().st_size == 0:
        raise _empty(str(path))
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        return str(path), load_dataset(builder, data_files={"train": str(path)}, split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise _empty(str(path)) from error
        fault = find_json_fault(path) if builder == "json" else None
        reason = fault or f"{path}: {error.__cause__ or error}"
        raise ValueError(f"`source.path`: {reason}; mend the file.") from error


def _empty(origin: str) -> ValueError:
    return ValueError(f"`source.path`: {origin} is empty; give a source with at least one row.")


def _load_saved(source: TextSource, path: Path) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source.path`: the directory {path} was not written by `save_to_disk` ({error}); "
            f"for the files in it give a glob such as {path}/*.jsonl."
        ) from error
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            raise ValueError(f"`source.split`={source.split!r} is not in {path}; it has {', '.join(map(str, saved))}.")
        return saved[source.split]
    return saved


def _load_hub(source: TextSource) -> Dataset:
    try:
        return load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError) as error:  # missing, offline, or an unknown configuration or split
        raise ValueError(
            f"`source.path`={source.path!r} is neither a file nor a dataset that the Hub or its local cache gave, with "
            f"`source.name`={source.name!r} and `source.split`={source.split!r}: {error}"
        ) from error


def _columns(source: TextSource, origin: str, dataset: Dataset) -> tuple[Kind, list[str]]:
    """What the rows are, from the columns asked for or, with none asked for, from those that are there."""
    forms: list[tuple[Kind, list[str | None]]] = [
        ("text", [source.text_column]),
        ("pairs", [source.prompt_column, source.response_column]),
        ("chat", [source.messages_column]),
    ]
    present = dataset.column_names
    for kind, names in forms:
        columns = [name for name in names if name is not None]
        if not columns:
            continue
        for column in columns:
            if column not in present:
                raise ValueError(f"{origin} has no column `{column}`; its columns are {', '.join(present)}.")
        return kind, columns
    found = [(kind, columns) for kind, columns in _USUAL if set(columns) <= set(present)]
    if len(found) == 1:
        return found[0]
    problem = "several of its columns could be meant" if found else "none of its columns has a usual name"
    raise ValueError(
        f"{origin}: {problem} ({', '.join(present)}); set `source.text_column`, `source.prompt_column` with "
        "`source.response_column`, or `source.messages_column`."
    )
