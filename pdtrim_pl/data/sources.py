"""Sources of text: the embedded text, files, saved datasets and the Hub. All are read as a `datasets.Dataset`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from math import inf
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, get_args

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from pdtrim_pl.data.files import JSON_ENDINGS, TEXT_ENDINGS, ending
from pdtrim_pl.data.malformed import Kind, OnBadRow, damaged, empty, skipped_rows
from pdtrim_pl.data.rows import Part, Rows
from pdtrim_pl.data.settings import Streaming, Turns
from pdtrim_pl.data.tables import column_names, read_table
from pdtrim_pl.errors import UserError

EMBEDDED_TEXT = "pydoc"
_ENDINGS = (*JSON_ENDINGS, *TEXT_ENDINGS, ".parquet")
_USUAL: list[tuple[Kind, list[str]]] = [
    ("text", ["text"]),
    ("pairs", ["prompt", "response"]),
    ("chat", ["messages"]),
    ("chat", ["conversations"]),
]
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class TextSource:
    """A source of text. The columns that are set say what a row is: a text, a prompt with its response, or a chat.

    If no column is set, the usual names are tried: `text`, `prompt` with `response`, `messages`, and `conversations`.
    Exactly one of the four must be in the source.
    """

    path: str = EMBEDDED_TEXT
    """`pydoc` for the Python Language Reference, which is part of every CPython; a .json, .jsonl, .txt, .raw or .text
    file, also with .gz; a .parquet file; a glob of such files; a directory written by `save_to_disk`; or a Hub id."""
    name: str | None = None
    """The configuration of a Hub dataset."""
    split: str = "train"
    """The split of a Hub or saved dataset."""
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    """A column of chats: lists of `{role, content}`, or of `{from, value}` as in ShareGPT. The chat template of the
    tokenizer turns them into text. Content is a text or a list of text parts. An assistant message is the response,
    everything before it is the prompt."""
    turns: Turns = "last"
    """Which assistant messages of a chat are responses: the `last` one, or `all`, each as an example of its own."""
    turn_weights: tuple[float, ...] = (1.0,)
    """What the assistant messages of a chat count in the training loss. The last number is that of the last message,
    the one before it that of the message before, and the first number that of all earlier ones. `weight` in a message
    wins over them. Only the ratios count. A message of weight 0 is no response."""
    on_bad_row: OnBadRow = "error"
    """`error` refuses a source with a bad row. `skip` leaves bad rows out, with a warning that gives their number and
    the places of the first ones. A file that cannot be split into rows is always refused."""

    streaming: Streaming | None = None
    """Read training text on the fly, for a source that is larger than memory."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"`source.path` is empty; give a file, a Hub id or `{EMBEDDED_TEXT}`.")
        if self.turns not in get_args(Turns):
            raise UserError(f"`source.turns`={self.turns!r} must be `last` or `all`.")
        if not self.turn_weights or not all(0 <= weight < inf for weight in self.turn_weights):
            raise UserError(f"`source.turn_weights`={list(self.turn_weights)} must be numbers of at least 0.")
        if self.turn_weights != (1.0,) and self.turns != "all":
            raise UserError(
                "`source.turn_weights` weighs the assistant messages of a chat, and `source.turns: last` takes one of "
                "them: set `source.turns: all`, or give weights in the messages."
            )
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"`source.on_bad_row`={self.on_bad_row!r} must be `error` or `skip`.")
        if (self.prompt_column is None) != (self.response_column is None):
            given = "prompt_column" if self.response_column is None else "response_column"
            raise UserError(
                f"`source.{given}` is set alone; pairs need both `source.prompt_column` and `source.response_column`."
            )
        given_kinds = [self.text_column, self.prompt_column, self.messages_column]
        if sum(column is not None for column in given_kinds) > 1:
            raise UserError(
                "`source.text_column`, `source.prompt_column` with `source.response_column`, and "
                "`source.messages_column` exclude each other; give one of the three."
            )


def load_rows(source: TextSource) -> Rows:
    """Read a source.

    Raises:
        UserError: the source is missing, empty or malformed, or its columns do not tell what a row is. The message
            names the file, the line and the column.
    """
    parts = [
        _read_file(source, loaded) if isinstance(loaded, Path) else _part(source, origin, loaded)
        for origin, loaded in _load(source)
    ]
    first = parts[0]
    for part in parts[1:]:
        if (part.kind, part.columns) != (first.kind, first.columns):
            raise UserError(f"`source.path`: {part.origin} has other columns than {first.origin}; name the columns.")
    datasets = [part.dataset for part in parts]
    whole = datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets)
    rows = Rows(whole, parts, source.on_bad_row, source.turns, source.turn_weights)
    if len(rows.dataset) == 0:
        skipped_rows(rows.skipped, len(rows.skipped))
    return rows


def _load(source: TextSource) -> list[tuple[str, Dataset | Path]]:
    """Pairs of origin and content: one pair per file, else one. Content is a dataset, or the path of a file to read."""
    if source.path == EMBEDDED_TEXT:
        documents = [topics[topic] for topic in sorted(topics)]
        return [(EMBEDDED_TEXT, Dataset.from_dict({"text": documents}))]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return [(str(path), load_saved(source, path))]
    if files := files_of(source):
        return [(str(file), _load_file(file)) for file in files]
    return [(source.path, _load_hub(source))]


def files_of(source: TextSource) -> list[Path]:
    """The file that a source names, or those that its glob matches, in order; none for what may be a Hub id.

    Raises:
        UserError: no file matches, or a file has an unknown ending or is empty.
    """
    path = Path(source.path).expanduser()
    files = [path] if path.is_file() else [Path(file) for file in sorted(glob(str(path), recursive=True))]
    if not files and (ending(path) in _ENDINGS or not _HUB_ID.fullmatch(source.path)):
        raise UserError(f"`source.path`: no file matches {source.path!r}; check the path.")
    for file in files:
        _check_file(file)
    return files


def _check_file(path: Path) -> None:
    if ending(path) not in _ENDINGS:
        raise UserError(
            f"`source.path`: {path} has an unknown ending; files are read by theirs: {', '.join(sorted(_ENDINGS))}, "
            f"and by {', '.join(f'{one}.gz' for one in JSON_ENDINGS)}."
        )
    if path.stat().st_size == 0:
        raise empty(str(path))


def _load_file(path: Path) -> Dataset | Path:
    if ending(path) != ".parquet":
        return path
    try:
        return load_dataset("parquet", data_files={"train": str(path)}, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise empty(str(path)) from error
        raise damaged(f"{path}: {error.__cause__ or error}") from error


def _part(source: TextSource, origin: str, dataset: Dataset) -> Part:
    if len(dataset) == 0:
        raise empty(origin)
    kind, columns = columns_of(source, origin, dataset.column_names)
    dataset = dataset.select_columns(columns)
    return Part(origin, dataset.map(_packed) if kind == "chat" else dataset, kind, columns)


def _packed(row: dict[str, Any]) -> dict[str, str]:
    return {column: json.dumps(value, default=str) for column, value in row.items()}


def _read_file(source: TextSource, path: Path) -> Part:
    kind, columns = columns_of(source, str(path), column_names(path))
    dataset, places, skipped = read_table(path, kind, columns, source.on_bad_row)
    return Part(str(path), dataset, kind, columns, places, skipped)


def load_saved(source: TextSource, path: Path) -> Dataset:
    """The dataset in a directory that `save_to_disk` wrote. Its rows stay on disk.

    Raises:
        UserError: the directory was not written so, or has no such split.
    """
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"`source.path`: the directory {path} was not written by `save_to_disk` ({error}); "
            f"for the files in it give a glob such as {path}/*.jsonl."
        ) from error
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            raise UserError(f"`source.split`={source.split!r} is not in {path}; it has {', '.join(map(str, saved))}.")
        return saved[source.split]
    return saved


def _load_hub(source: TextSource) -> Dataset:
    try:
        return load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError) as error:  # missing, offline, or an unknown configuration or split
        raise UserError(
            f"`source.path`={source.path!r} is neither a file nor a dataset that the Hub or its local cache gave, with "
            f"`source.name`={source.name!r} and `source.split`={source.split!r}: {error}"
        ) from error


def columns_of(source: TextSource, origin: str, present: Sequence[str]) -> tuple[Kind, list[str]]:
    """The kind of the rows and the columns to read: those that the settings name, else those of a usual name.

    Raises:
        UserError: a column is not there, or none or several could be meant.
    """
    forms: list[tuple[Kind, list[str | None]]] = [
        ("text", [source.text_column]),
        ("pairs", [source.prompt_column, source.response_column]),
        ("chat", [source.messages_column]),
    ]
    for kind, names in forms:
        columns = [name for name in names if name is not None]
        if not columns:
            continue
        for column in columns:
            if column not in present:
                raise UserError(f"{origin} has no column `{column}`; its columns are {', '.join(present)}.")
        return kind, columns
    found = [(kind, columns) for kind, columns in _USUAL if set(columns) <= set(present)]
    if len(found) == 1:
        return found[0]
    problem = "several of its columns could be meant" if found else "none of its columns has a usual name"
    raise UserError(
        f"{origin}: {problem} ({', '.join(present)}); set `source.text_column`, `source.prompt_column` with "
        "`source.response_column`, or `source.messages_column`."
    )
