"""Files and chats as people have them: what loads, what is refused with its line, what `skip` leaves out."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from row_files import encoded, lines, texts, written

from pdtrim_pl.data import Lengths, TextSource
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.models.pretrained import load_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "response": f"answer {number}"}


ROWS = [*map(pair, range(1, 10)), {"prompt": "question 10", "response": ""}, pair(11)]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("data", "place"),
    [
        (json.dumps(ROWS).encode(), "line 1, row 10"),
        (json.dumps(ROWS, indent=1).encode(), "line 38, row 10"),
        (b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n", "line 11, row 10"),
        (b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode(), "line 2, row 10"),
        (b"\xef\xbb\xbf" + lines(*ROWS), "line 10"),
        (b"\n \n" + lines(*ROWS).replace(b"\n", b"\r\n\r\n"), "line 21"),
        (lines(*ROWS[:5]) + b"\xef\xbb\xbf" + lines(*ROWS[5:]), "line 10"),
    ],
)
def test_a_bad_row_is_named_by_its_place_in_any_layout(
    data: bytes, place: str, name: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, data, name)
    with pytest.raises(ValueError, match=rf"{name}, {place}: column `response` is empty; mend or drop the row"):
        encoded(tiny_tokenizer_dir, path)
    with pytest.warns(UserWarning, match=rf"1 of 11 rows are left out: .*{name}, {place}: column `response` is empty"):
        examples = encoded(tiny_tokenizer_dir, path, on_bad_row="skip")
    assert texts(tiny_tokenizer_dir, examples)[9:] == [("question 11", "answer 11<eos>")]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'[{"text": "a"},\n {"text": "b"},\n]', r"data\.jsonl, line 2: A comma before the end of the array"),
        (b'[{"text": "a"}\n {"text": "b"}]', r"data\.jsonl, line 2: Expecting a comma or the end of the array"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', r"data\.jsonl, line 2: Something follows the array"),
        (b'[{"text": "a"},\n {"text": "b"', r"data\.jsonl, line 2: Expecting ',' delimiter"),
        (b'[{"text": "a"},\n {"text": "b\xe9"}]', r"data\.jsonl, line 2: is not UTF-8 \(byte 0xe9\)"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "behind row 1: not readable as JSON"),
        (
            lines({"text": "a"}).decode().encode("utf-16"),
            r"data\.jsonl cannot be read: its encoding is utf-16 or utf-32; save it as utf-8",
        ),
        (b"\n" + lines({"text": "a"}).decode().encode("utf-16-le"), "its encoding is utf-16"),
        (lines({"text": "a"}).decode().encode("utf-16-be"), "its encoding is utf-16"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_that_cannot_be_told_into_rows_is_refused(
    data: bytes, problem: str, on_bad_row: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"`source.path`: .*({problem}).*"):
        load_rows(TextSource(written(tmp_path, data), on_bad_row=on_bad_row))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "caf\xe9"}', r"is not UTF-8 \(byte 0xe9\)"),
        (b'{"text": "b"},', r"not valid JSON \(Extra data at column 14\)"),
        (b'{"text": "b",}', "not valid JSON"),
        (b'{"text": "b"', "not valid JSON"),
        (b'["b"]', "holds a list, not an object"),
        (b'{"text": "smile \\ud83d"}', r"column `text` holds half of a character \(\\ud83d\)"),
        (b'{"text": ["b"]}', "column `text` holds a list, not a str"),
        (b'{"body": "b"}', "column `text` holds nothing, not a str"),
        (b'{"text": ' + b"[" * 100_000, "not readable as JSON"),
        (b'{"text": "b", "id": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    ],
)
def test_one_bad_line_is_named_or_left_out(line: bytes, problem: str, tmp_path: Path) -> None:
    path = written(tmp_path, lines({"text": "a"}) + line + b"\n" + lines({"text": "c"}))
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: {problem}.*`source.on_bad_row` to `skip`"):
        load_rows(TextSource(path))
    rows = load_rows(TextSource(path, on_bad_row="skip"))
    assert list(rows.dataset["text"]) == ["a", "c"]
    assert rows.where(1).endswith("data.jsonl, line 3")
    assert len(rows.skipped) == 1


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, b"one\ntwo\ncaf\xe9\n", "book.txt")
    with pytest.raises(ValueError, match=r"book\.txt, line 3: is not UTF-8 \(byte 0xe9\)"):
        load_rows(TextSource(path))
    written(tmp_path, "one".encode("utf-16"), "wide.txt")
    with pytest.raises(ValueError, match=r"wide\.txt cannot be read: its encoding is utf-16"):
        load_rows(TextSource(str(tmp_path / "wide.txt")))
    written(tmp_path, b"\xef\xbb\xbfgood", "another.txt")
    (tmp_path / "wide.txt").unlink()
    assert list(load_rows(TextSource(str(tmp_path / "*.txt"), on_bad_row="skip")).dataset["text"]) == ["good"]


def test_a_row_with_bytes_of_another_encoding_is_an_error_at_first_and_left_out_on_request(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    bad = [b'{"prompt": "caf\xe9", "response": "b"}\n'] * 4 + [lines({"prompt": "a", "response": 5})]
    path = written(tmp_path, lines(pair(1)) + b"".join(bad) + lines(pair(2)))
    with pytest.warns(UserWarning, match="on_bad_row") as found:
        examples = encoded(tiny_tokenizer_dir, path, on_bad_row="skip")
    (message,) = [str(warning.message) for warning in found]
    assert message.startswith("`source.on_bad_row` is `skip`: 5 of 7 rows are left out: ")
    assert [f"line {number}:" in message for number in (2, 3, 4, 5, 6)] == [True, True, True, False, False]
    assert [prompt for prompt, _ in texts(tiny_tokenizer_dir, examples)] == ["question 1", "question 2"]


def test_rows_that_were_left_out_are_counted_again_when_the_cache_is_used(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, lines(pair(1), {"prompt": ""}, {"prompt": "a", "response": "b"}))
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 3 rows are left out"):
            encoded(tiny_tokenizer_dir, path, on_bad_row="skip")
    with pytest.raises(ValueError, match="line 2"):
        encoded(tiny_tokenizer_dir, path)


@pytest.mark.parametrize(
    "data",
    [b"not\njson\n", lines({"prompt": 5, "response": ""}, {"prompt": "a", "response": " "})],
)
def test_a_source_of_bad_rows_alone_is_an_error(data: bytes, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every row is bad, 2 of 2: .*data\.jsonl, line 1"):
        encoded(tiny_tokenizer_dir, written(tmp_path, data), on_bad_row="skip")


def test_chats_that_do_not_fit_the_template_are_left_out_on_request(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    tokenizer.chat_template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{% for key, value in call | items %}{{ key }}"
        "{% endfor %}{% endfor %}{{ m.content or '' }}\n{% endfor %}"
    )
    bad = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": ["{}"]}, CHAT[1]]
    path = written(tmp_path, lines({"messages": CHAT}, {"messages": bad}, {"messages": CHAT[:1]}))
    rows = load_rows(TextSource(path, on_bad_row="skip"))
    with pytest.warns(UserWarning, match=r"2 of 3 rows .*line 2: column `messages` does not fit .* line 3: column"):
        assert len(encode(rows, tokenizer, Lengths(256, 1, 128), 0)) == 1


def test_a_source_without_bad_rows_says_nothing(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(pair(1), pair(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(encoded(tiny_tokenizer_dir, path, on_bad_row="skip")) == 2


def test_rows_of_tables_are_left_out_too(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    Dataset.from_dict({"prompt": ["a", None, "c"], "response": ["a", "b", "c"]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"data\.parquet, row 2: column `prompt` holds nothing"):
        encoded(tiny_tokenizer_dir, path)
    with pytest.warns(UserWarning, match=r"1 of 3 rows are left out: .*data\.parquet, row 2"):
        assert len(encoded(tiny_tokenizer_dir, path, on_bad_row="skip")) == 2


def test_another_word_for_bad_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`source.on_bad_row`='drop' must be `error` or `skip`"):
        TextSource(on_bad_row="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json.gz", "data.txt.gz"])
def test_packed_files_are_read(name: str, tmp_path: Path) -> None:
    data = b"one" if ".txt" in name else lines({"text": "one"})
    assert list(load_rows(TextSource(written(tmp_path, gzip.compress(data), name))).dataset["text"]) == ["one"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (gzip.compress(b'{"text": "one"}\n' * 999)[:-12], "cannot be read"),
        (b'{"text": "one"}\n', "Not a gzipped file"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(b'{"text": "one"}\n{"text"\n'), "line 2: not valid JSON"),
    ],
    ids=["cut short", "not packed", "empty", "bad line"],  # gzip writes the time into its bytes
)
def test_damaged_packed_files_are_refused(data: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.jsonl\.gz.*{problem}"):
        load_rows(TextSource(written(tmp_path, data, "data.jsonl.gz")))


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.parquet.gz", "data.jsonl.zst"])
def test_other_formats_stay_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} has an unknown ending; .*\.jsonl, .*\.jsonl\.gz"):
        load_rows(TextSource(written(tmp_path, b"a,b\n", name)))


def test_a_packed_file_that_is_not_there_is_no_dataset_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"no file matches 'none\.jsonl\.gz'"):
        load_rows(TextSource("none.jsonl.gz"))


def test_texts_that_look_like_dates_stay_texts(tmp_path: Path) -> None:
    path = written(tmp_path, lines(*[{"prompt": "2021-01-01", "response": "2021-01-02T00:00:00"}] * 2))
    assert list(load_rows(TextSource(path)).dataset["response"]) == ["2021-01-02T00:00:00"] * 2


def test_a_column_may_first_occur_in_a_later_row(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines({"prompt": "a"}, pair(2)))
    with pytest.raises(ValueError, match="line 1: column `response` holds nothing"):
        encoded(tiny_tokenizer_dir, path)
