"""A source in pieces: every row is in one piece, and the examples of a piece are those of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from row_files import lines, written

from pdtrim_pl.data import Lengths, TextSource, pieces
from pdtrim_pl.data.files import lines_between
from pdtrim_pl.data.formatting import encode, encode_piece
from pdtrim_pl.data.pieces import PiecedSource
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.models.pretrained import load_tokenizer

LONG = Lengths(256, 1, 128)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0.5}]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(pieces, "PIECE_ROWS", 3)


def rows_of(source: TextSource) -> list[dict[str, Any]]:
    """The rows of all pieces, one piece after the other."""
    cut = PiecedSource(source)
    assert len(cut) > 2
    return [row for number in range(len(cut)) for row in cut.rows(number).dataset]


@given(texts=st.lists(st.text(st.sampled_from("aé\n "), max_size=40), max_size=12), size=st.integers(1, 60))
def test_every_line_is_in_the_piece_in_which_it_begins(
    texts: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "text.txt"
    whole = "\n".join(texts).encode()
    path.write_bytes(whole)
    cut = [list(lines_between(path, start, start + size)) for start in range(0, len(whole), size)]
    assert b"".join(line for piece in cut for _, line in piece) == whole
    for number, piece in enumerate(cut):
        assert all(number * size <= at < (number + 1) * size for at, _ in piece)
        assert all(whole[at : at + len(line)] == line for at, line in piece)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("kind", ["text", "pairs", "chat"])
def test_the_pieces_of_every_format_have_the_rows_of_the_source(ending: str, kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": {"text": f"text {n}"}, "pairs": {"prompt": f"{n}?", "response": f"{n}!"}, "chat": {"messages": CHAT}}[
            kind
        ]
        for n in range(20)
    ]
    path = str(tmp_path / f"data.{ending}")
    if ending == "jsonl":
        written(tmp_path, lines(*rows))
    elif ending == "parquet":
        pyarrow.parquet.write_table(Dataset.from_list(rows).data.table, path, row_group_size=7)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    found, whole = rows_of(TextSource(path)), list(load_rows(TextSource(path)).dataset)
    if kind == "chat":
        found, whole = ([json.loads(row["messages"]) for row in each] for each in (found, whole))
    assert found == whole


@pytest.mark.usefixtures("small_pieces")
def test_a_text_file_is_cut_at_the_ends_of_lines(tmp_path: Path) -> None:
    text = "".join(f"line {number} é\n" * (1 + number % 3) for number in range(40))
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("no end", encoding="utf-8")
    rows = rows_of(TextSource(str(tmp_path / "*.txt")))
    assert "".join(row["text"] for row in rows) == text + "no end"
    assert all(row["text"].endswith("\n") for row in rows[:-1])


@pytest.mark.usefixtures("small_pieces")
def test_a_bad_row_is_named_by_its_place(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    good = [{"prompt": f"{number}", "response": "a" * 30} for number in range(6)]
    path = written(tmp_path, lines(*good, {"prompt": "b", "response": 5}, *good, {"prompt": "c", "response": ""}))
    cut = PiecedSource(TextSource(path))
    at = len(lines(*good))
    with pytest.raises(ValueError, match=rf"data\.jsonl, line at byte {at}: column `response` holds a int"):
        rows_of(TextSource(path))
    cut = PiecedSource(TextSource(path, on_bad_row="skip"))
    kept = [cut.rows(number) for number in range(len(cut))]
    assert sum(len(rows.dataset) for rows in kept) == 12
    assert [row.split(": ")[0] for rows in kept for row in rows.skipped] == [
        f"{path}, line at byte {at}",
        f"{path}, line at byte {2 * at + len(lines({'prompt': 'b', 'response': 5}))}",
    ]
    (holed,) = [rows for rows in kept if rows.skipped and len(rows.dataset)][:1]
    with pytest.warns(UserWarning, match=r"`source.on_bad_row` is `skip`: 1 of \d rows are left out: .*line at byte"):
        encode_piece(holed, load_tokenizer(str(tiny_tokenizer_dir)), LONG, (0,))


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("kind", ["text", "pairs", "chat"])
def test_a_source_of_one_piece_has_the_examples_of_the_whole(
    kind: str, turns: Any, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows: dict[str, Any] = {
        "text": [{"text": f"text {number} " * 40} for number in range(9)],
        "pairs": [{"prompt": f"{number}? " * 60, "response": f"{number}!" * number or "."} for number in range(9)],
        "chat": [{"messages": [{**CHAT[0], "content": f"{number}"}, CHAT[1]] * 3} for number in range(9)],
    }
    source = TextSource(written(tmp_path, lines(*rows[kind])), turns=turns)
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    (cut,) = [PiecedSource(source)]
    assert len(cut) == 1
    found, whole = encode_piece(cut.rows(0), tokenizer, LONG, (3,)), encode(load_rows(source), tokenizer, LONG, 3)
    assert len(found) == len(whole) > 0
    for ours, theirs in zip(found, whole, strict=True):
        assert torch.equal(ours.prompt, theirs.prompt)
        assert torch.equal(ours.response, theirs.response)
        assert ours.weight == theirs.weight


def test_a_piece_may_have_no_example(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    for row in ({"text": "short"}, {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}):
        cut = PiecedSource(TextSource(written(tmp_path, lines(row))))
        assert len(encode_piece(cut.rows(0), tokenizer, LONG, (0,))) == 0


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", b"x", r"reads files from their middle, and .*a\.jsonl\.gz is packed: unpack it"),
        ("a.json", b'\n [{"text": "a"}]', r"a\.json is one array: write one row a line"),
        ("a.jsonl", b"\xff\xfe", "its encoding is utf-16"),
        ("a.parquet", b"PAR1", r"a\.parquet: .*; mend the file"),
        ("a.csv", b"a", r"a\.csv has an unknown ending"),
        ("a.txt", b"", r"a\.txt is empty"),
    ],
)
def test_a_file_that_cannot_be_read_from_its_middle_is_named(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        PiecedSource(TextSource(written(tmp_path, data, name)))


def test_a_source_that_is_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Download a Hub dataset .* give a glob of its files"):
        PiecedSource(TextSource("org/data"))
    with pytest.raises(ValueError, match=r"`pydoc` is small; leave `source.streaming` out"):
        PiecedSource(TextSource())
