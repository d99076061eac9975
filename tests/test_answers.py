"""`pdtrim answer`: a model's own responses to prompts, one batch at a time, and again after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pdtrim_pl.cli.main import main
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.data.sources import TextSource
from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.answers import AnswerSettings, answer_file
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate, stop_ids_of

WORDS = ("one", "a second one", "x", "the third of many", "and so on, and on", "last")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"prompt": WORDS[i % len(WORDS)] + "." * i} for i in range(20)])


def test_every_response_is_the_models_own_greedy_one(tiny_llama_dir: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert answer_file(str(tiny_llama_dir), prompts, output, AnswerSettings(12, batch_size=3)) == 20
    staged = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)))
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    stops = stop_ids_of(staged.model, tokenizer)
    for row, asked in zip(rows_of(output), rows_of(prompts), strict=True):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        (expected,) = generate(staged, ids, max_new_tokens=12, stop_ids=stops).tolist()
        assert row["prompt"] == asked["prompt"]
        assert row["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if expected[-1] in stops else "length")


@pytest.mark.parametrize("left", [0, 1, 7, 8, 13])
def test_a_file_that_is_continued_equals_one_that_was_never_left(
    left: int, tiny_llama_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left after some rows, in the middle of the next one."""
    monkeypatch.setattr("pdtrim_pl.harness.answers.WINDOW", 2)
    settings = AnswerSettings(6, Sampling(temperature=1.0, seed=3), batch_size=4)
    output = tmp_path / "answers.jsonl"
    answer_file(str(tiny_llama_dir), prompts, output, settings)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:left]) + lines[left][:5])
    assert answer_file(str(tiny_llama_dir), prompts, output, settings) == 20
    assert output.read_bytes() == whole
    assert len({row["response"] for row in rows_of(output)}) > 10, "sampled"


def test_a_finished_file_is_left_as_it_is(
    tiny_llama_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    answer_file(str(tiny_llama_dir), prompts, output, AnswerSettings(2))
    before = output.read_bytes()
    monkeypatch.setattr("pdtrim_pl.harness.answers.load_causal_lm", None)  # no model is needed
    assert answer_file(str(tiny_llama_dir), prompts, output, AnswerSettings(2)) == 20
    assert output.read_bytes() == before


def test_chats_are_answered_at_their_end_and_what_was_there_is_answered_anew(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rows = [{"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "Hi"}]}, {"prompt": "Hello"}]
    prompts, output = write(tmp_path / "chats.jsonl", rows), tmp_path / "answers.jsonl"
    args = ["--model", str(tiny_llama_dir), "--prompts", str(prompts), "--output", str(output)]
    assert main(["answer", *args, "--chat", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == f"{output}: 3 rows\n"
    first, second, third = rows_of(output)
    assert first == second
    assert first["messages"][:2] == asked
    assert [turn["role"] for turn in third["messages"]] == ["user", "assistant"]
    data = PromptResponseDataModule(
        str(tiny_llama_dir),
        TextSource(str(output)),
        Lengths(200, 1, 150),
        Parts(validation=0, calibration=0),
        batch_size=1,
    )
    data.setup("fit")
    assert len(data.train_dataloader()) == 2, "the answers are a source of training text"


def test_what_cannot_be_answered_or_continued_is_refused(tiny_llama_dir: Path, prompts: Path, tmp_path: Path) -> None:
    model, output = str(tiny_llama_dir), tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match="`max_new_tokens` is 0: give at least 1"):
        AnswerSettings(0)
    with pytest.raises(UserError, match=r"prompts.jsonl, line 1: prompt and `max_new_tokens` take 60\d tokens"):
        answer_file(model, prompts, output, AnswerSettings(600))
    assert not output.exists()
    answer_file(model, prompts, output, AnswerSettings(2))
    with pytest.raises(UserError, match=r"was made with other settings than .*: max_new_tokens, sampling \("):
        answer_file(model, prompts, output, AnswerSettings(3, Sampling(temperature=0.5)))
    other = write(tmp_path / "other.jsonl", [{"prompt": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=r"other.jsonl, line 2: has neither a `prompt` nor `messages`"):
        answer_file(model, other, output)
    write(other, [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"prompts_sha256 \(answers.jsonl.origin\). Name another"):
        answer_file(model, other, output, AnswerSettings(2))
