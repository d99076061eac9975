"""Chats in every form that people keep them in are one text; a message that cannot be read is named."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from row_files import encoded, lines, texts, written

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


TOLD = ("<bos>system\nbe kind<eos>\n<bos>user\nhi there<eos>\n<bos>assistant\n", "yo<eos>")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
                {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi there"},
                {"from": "gpt", "value": "yo"},
            ]
        },
        {
            "id": 5,
            "conversations": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi there"},
                {"role": "assistant", "content": "yo"},
            ],
        },
    ],
)
def test_every_form_of_a_chat_is_the_same_text(
    row: dict[str, Any], ending: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / f"data.{ending}")
    if ending == "jsonl":
        written(tmp_path, lines(row))
    else:
        Dataset.from_list([row]).to_parquet(path)
    assert texts(tiny_tokenizer_dir, encoded(tiny_tokenizer_dir, path)) == [TOLD]


def test_rows_of_one_file_may_hold_chats_in_different_forms(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"from": "gpt", "value": "yo"}]
    path = written(tmp_path, lines({"messages": CHAT}, {"messages": parts}))
    first, second = texts(tiny_tokenizer_dir, encoded(tiny_tokenizer_dir, path))
    assert first == second


def test_chats_of_a_table_and_of_lines_make_one_source(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    Dataset.from_list([{"messages": CHAT}]).to_parquet(tmp_path / "a.parquet")
    written(tmp_path, lines({"messages": [CHAT[0] | {"name": "x"}, CHAT[1]]}), "b.jsonl")
    assert len(encoded(tiny_tokenizer_dir, str(tmp_path / "[ab].*"))) == 2


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "content part of type `image_url`"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "part of type `image`"),
        ({"role": "user", "content": ["a"]}, "part of type `str`"),
        ({"role": "user", "content": {"text": "a"}}, "whose content is a dict, not a text"),
        ({"role": "user", "content": None}, "one of `user` has no content"),
        ({"role": "user", "text": "a"}, "one of `user` has no content"),
        ({"from": "bing", "value": "a"}, "has a message from 'bing'; known are `human`"),
        ({"from": "human", "text": "a"}, "one of `user` has no content"),
        ({"content": "a"}, "must hold messages with `role` and `content`"),
        ("a", "holds a str where a message belongs"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(
    turn: Any, problem: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, lines({"messages": CHAT}, {"messages": [turn, CHAT[1]]}))
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: column `messages` .*{problem}"):
        encoded(tiny_tokenizer_dir, path)
