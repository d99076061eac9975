"""Reading text: every format, and the message for every way a source can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from pdtrim_pl.data import TextSource
from pdtrim_pl.data.sources import load_rows

TEXTS = ["first text", "second text", "third text"]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_embedded_text_has_a_document_per_topic() -> None:
    rows = load_rows(TextSource())
    assert rows.kind == "text"
    assert len(rows.dataset) > 50
    assert sum(map(len, rows.dataset["text"])) > 200_000


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "saved", "saved-dict"])
def test_every_table_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{ending}"
    table = Dataset.from_dict({"body": TEXTS, "other": [1, 2, 3]})
    if ending == "json":
        path.write_text(json.dumps(table.to_list()), encoding="utf-8")
    elif ending == "jsonl":
        write_jsonl(path, table.to_list())
    elif ending == "parquet":
        table.to_parquet(path)
    elif ending == "saved":
        table.save_to_disk(path)
    else:
        DatasetDict({"train": table}).save_to_disk(path)
    rows = load_rows(TextSource(path=str(path), text_column="body"))
    assert list(rows.dataset["body"]) == TEXTS
    assert rows.dataset.column_names == ["body"]


@pytest.mark.parametrize("ending", ["txt", "raw", "text"])
def test_a_text_file_is_one_document(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"book.{ending}"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(load_rows(TextSource(path=str(path))).dataset["text"]) == ["one\n\ntwo\n"]


def test_a_glob_reads_its_files_in_order_and_names_the_row_of_the_right_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "third"}])
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n', encoding="utf-8")
    rows = load_rows(TextSource(path=str(tmp_path / "*.jsonl")))
    assert list(rows.dataset["text"]) == ["first", "second", "third"]
    assert rows.where(1) == f"{tmp_path / 'a.jsonl'}, line 3"
    assert rows.where(2) == f"{tmp_path / 'b.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"prompt": "a", "response": "b"}, "pairs"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat"),
    ],
)
def test_usual_column_names_are_found_without_being_given(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    assert load_rows(TextSource(path=str(path))).kind == kind


def test_given_columns_win_over_usual_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a", "prompt": "b", "response": "c"}])
    with pytest.raises(ValueError, match=r"several of its columns could be meant \(text, prompt, response\)"):
        load_rows(TextSource(path=str(path)))
    rows = load_rows(TextSource(path=str(path), prompt_column="response", response_column="text"))
    assert rows.kind == "pairs"
    assert list(rows.columns) == ["response", "text"]


def test_unknown_columns_are_refused_with_a_list_of_those_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"body": "a", "id": 1}])
    with pytest.raises(ValueError, match=r"data\.jsonl has no column `txt`; its columns are body, id"):
        load_rows(TextSource(path=str(path), text_column="txt"))
    with pytest.raises(ValueError, match=r"has a usual name \(body, id\); set `source.text_column`"):
        load_rows(TextSource(path=str(path)))


def test_half_a_pair_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`source.prompt_column` is set alone"):
        TextSource(prompt_column="q")


def test_two_forms_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        TextSource(text_column="a", messages_column="b")


@pytest.mark.parametrize("name", ["none.jsonl", "*.parquet", "/nowhere/data", "./nowhere"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"`source.path`: no file matches"):
        load_rows(TextSource(path=name))


def test_a_hub_dataset_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ValueError, match=r"`source.path`='org/none' is neither a file nor a dataset"):
        load_rows(TextSource(path="org/none"))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.txt", "empty.parquet"])
def test_an_empty_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_dict({"text": []}).to_parquet(path)
    else:
        path.touch()
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        load_rows(TextSource(path=str(path)))


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.csv has an unknown ending"):
        load_rows(TextSource(path=str(tmp_path / "data.csv")))


def test_a_directory_that_is_no_saved_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not written by `save_to_disk`"):
        load_rows(TextSource(path=str(tmp_path)))


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`source.split`='dev' is not in .*; it has train"):
        load_rows(TextSource(path=str(tmp_path / "saved"), split="dev"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "line 3: not valid JSON"),
        ('["a"]', "line 3: holds a list, not an object"),
        ("free text", "line 3: not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": "b"}}\n{line}\n{{"text": "c"}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data\.jsonl, {problem}"):
        load_rows(TextSource(path=str(path)))


def test_a_malformed_json_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"},\n {"text": }]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.json, line 2: Expecting value"):
        load_rows(TextSource(path=str(path)))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"`source.path`: .*data\.parquet: .*; mend the file"):
        load_rows(TextSource(path=str(tmp_path / "data.parquet")))
