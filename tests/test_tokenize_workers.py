"""Several processes tokenise what one does, under the same key of the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import disable_caching, enable_caching
from row_files import lines, written

from pdtrim_pl.data import Lengths, PromptResponseDataModule, TextSource, TokenExamples, formatting
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.models.pretrained import load_tokenizer

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"text {n} " * 30} for n in range(11)],
    "pairs": [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(11)],
    "chat": [
        {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": f"yo {n}"}] * 2}
        for n in range(11)
    ],
}
FUNCTIONS = {"text": "_text_ids", "pairs": "_pair_ids", "chat": "_chat_ids"}


def examples(tokenizer: Path, path: str, workers: int, **source: Any) -> list[list[int]]:
    made: TokenExamples = encode(
        load_rows(TextSource(path, **source)), load_tokenizer(str(tokenizer)), Lengths(64, 1, 32), 0, workers
    )
    return [torch.cat(made[index]).tolist() for index in range(len(made))]


@contextmanager
def uncached() -> Iterator[None]:
    disable_caching()
    try:
        yield
    finally:
        enable_caching()


def processes(monkeypatch: pytest.MonkeyPatch, kind: str, folder: Path) -> set[int]:
    """Let the process ids of those who tokenise be left in `folder`; returns those left so far."""
    folder.mkdir(exist_ok=True)
    found = {int(file.name) for file in folder.iterdir()}
    function = getattr(formatting, FUNCTIONS[kind])

    def noted(*args: Any, **kwargs: Any) -> Any:
        (folder / str(os.getpid())).touch()
        return function(*args, **kwargs)

    noted.__name__ = FUNCTIONS[kind]
    monkeypatch.setattr(formatting, FUNCTIONS[kind], noted)
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_two_processes_make_the_examples_of_one(
    kind: str, tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, lines(*ROWS[kind]))
    source = {"turns": "all"} if kind == "chat" else {}
    with uncached():
        alone = examples(tiny_tokenizer_dir, path, 1, **source)
        with monkeypatch.context() as patch:
            processes(patch, kind, tmp_path / "ids")
            together = examples(tiny_tokenizer_dir, path, 2, **source)
            seen = processes(patch, kind, tmp_path / "ids")
    assert together == alone
    assert len(seen) == 2
    assert os.getpid() not in seen


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_what_any_number_of_processes_has_tokenised_is_taken_from_the_cache(
    first: int, then: int, tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, lines(*ROWS["text"], {"text": f"only here: {first} {then}"}))
    made = examples(tiny_tokenizer_dir, path, first)
    with monkeypatch.context() as patch:
        processes(patch, "text", tmp_path / "ids")
        assert examples(tiny_tokenizer_dir, path, then) == made
        assert not processes(patch, "text", tmp_path / "ids")


def test_more_processes_than_rows_are_not_started(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(*ROWS["pairs"][:2]))
    with uncached():
        assert examples(tiny_tokenizer_dir, path, 5) == examples(tiny_tokenizer_dir, path, 1)


def test_a_bad_row_is_named_and_skipped_as_by_one_process(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(*ROWS["pairs"], {"prompt": "a", "response": ""}))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 12: column `response` is empty; mend or drop the row"):
        examples(tiny_tokenizer_dir, path, 2)
    with pytest.warns(UserWarning, match=r"1 of 12 rows are left out: .*data\.jsonl, line 12: column `response`"):
        kept = examples(tiny_tokenizer_dir, path, 2, on_bad_row="skip")
    assert len(kept) == 11


def test_the_data_module_has_the_setting(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(*ROWS["pairs"]))
    made = []
    for workers in (1, 2):
        with uncached():
            module = PromptResponseDataModule(str(tiny_tokenizer_dir), TextSource(path), tokenize_workers=workers)
            module.setup()
        made.append([batch.response_ids.tolist() for batch in module.train_dataloader()])
    assert made[0] == made[1]
    with pytest.raises(ValueError, match="`tokenize_workers`=0 must be at least 1"):
        PromptResponseDataModule("unused", tokenize_workers=0)
