"""The offline task files: what they ask, on made-up rows in the formats of the data folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.local_data import pages_of_text, rows_of_file, rows_with_examples

TASKS = Path(__file__).parents[1] / "configs" / "tasks"
QUESTION = {"context": "Question: What is wet?\nAnswer:", "choices": ["water", "stone"], "label": 0}
LETTERS = ["A", "B", "C", "D"]


def letters(question: str, label: int, subject: str) -> dict[str, Any]:
    context = f"{question}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    return {"context": context, "choices": LETTERS, "label": label, "subject": subject}


SOLVED = [
    letters(f"{subject} {number}?", number % 4, subject) for number in range(6) for subject in ("high_sums", "law")
]
FILES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "piqa/validation.jsonl": [{**QUESTION, "context": "Question: Dry a plate\nAnswer:", "choices": ["Wipe.", "Wet."]}],
    "hellaswag/val.jsonl": [{**QUESTION, "context": "Baking: A man stirs. He", "choices": ["bakes.", "flies."]}],
    "arc_easy/test.jsonl": [QUESTION, {**QUESTION, "label": 1}],
    "arc_challenge/test.jsonl": [QUESTION],
    "openbookqa/test.jsonl": [{**QUESTION, "context": "Rain is"}],
    "boolq/dev.jsonl": [{"context": "Passage: Ice.\nQuestion: is it cold?", "choices": ["no", "yes"], "label": 1}],
    "winogrande/dev.jsonl": [
        {
            "context": "Ann asked Bea as",
            "choices": ["Ann knew.", "Bea knew."],
            "label": 1,
            "option1": "Ann",
            "option2": "Bea",
            "continuation": "knew.",
        }
    ],
    "mmlu/val.jsonl": [letters("law 9?", 2, "law"), letters("high_sums 9?", 3, "high_sums")],
    "mmlu/dev.jsonl": SOLVED,
    "gsm8k/test.jsonl": [{"prompt": f"What is {n} + 1?", "response": f"It is more.\n#### {n + 1}"} for n in range(7)],
    "lambada/test.jsonl": [{"context": "He said it", "target": "again"}, {"context": "And then", "target": "again"}],
}
WIKI = " = First = \n One word . \n = = Part = = \n More . \n = Second = \n Two words . \n"
ASKED: Mapping[str, Sequence[tuple[str, str]]] = {
    "piqa_local": [("Question: Dry a plate\nAnswer:", " Wipe."), ("Question: Dry a plate\nAnswer:", " Wet.")],
    "hellaswag_local": [("Baking: A man stirs. He", " bakes."), ("Baking: A man stirs. He", " flies.")],
    "arc_easy_local": [(QUESTION["context"], " water"), (QUESTION["context"], " stone")],
    "arc_challenge_local": [(QUESTION["context"], " water"), (QUESTION["context"], " stone")],
    "openbookqa_local": [("Rain is", " water"), ("Rain is", " stone")],
    "boolq_local": [("Passage: Ice.\nQuestion: is it cold?\nAnswer:", answer) for answer in (" no", " yes")],
    "winogrande_local": [("Ann asked Bea as Ann", " knew."), ("Ann asked Bea as Bea", " knew.")],
    "mmlu_local": [
        (
            "The following are multiple choice questions (with answers) about law.\n\n"
            + "".join(
                [f"{row['context']} {LETTERS[row['label']]}\n\n" for row in SOLVED if row["subject"] == "law"][:5]
            )
            + letters("law 9?", 2, "law")["context"],
            f" {letter}",
        )
        for letter in LETTERS
    ],
    "lambada_local": [("He said it", " again")],
}
"""What a task asks of its first row: contexts and continuations."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    for name, rows in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "wiki.valid.raw").write_text(WIKI)
    monkeypatch.setenv("PDTRIM_DATA", str(folder))
    return folder


def test_a_pattern_names_one_file(data: Path) -> None:
    assert rows_of_file(file="arc_easy/*.jsonl")["test"]["label"] == [0, 1]
    (data / "arc_easy" / "train.jsonl").write_text('{"context": "a"}\n')
    with pytest.raises(UserError, match=r"has arc_easy/test\.jsonl, arc_easy/train\.jsonl: keep the one"):
        rows_of_file(file="arc_easy/*.jsonl")


def test_a_file_without_labels_is_refused(data: Path) -> None:
    (data / "piqa" / "validation.jsonl").write_text('{"text": "Question: Dry a plate"}\n')
    columns = ["context", "choices", "label"]
    with pytest.raises(UserError, match=r"line 1: has no context, choices, label \(it has text\)"):
        rows_of_file(file="piqa/validation.jsonl", columns=columns)
    (data / "piqa" / "validation.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"line 1: not valid JSON"):
        rows_of_file(file="piqa/validation.jsonl")
    (data / "piqa" / "validation.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"has no row"):
        rows_of_file(file="piqa/validation.jsonl")


def test_examples_are_of_the_same_subject(data: Path) -> None:
    rows = rows_with_examples(file="mmlu/val.jsonl", examples_file="mmlu/dev.jsonl", by="subject", examples=2)["test"]
    assert rows["examples"][0] == (
        "law 0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\nlaw 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    )
    assert rows["examples"][1].startswith("high_sums 0?")


def test_raw_wikitext_is_cut_into_articles(data: Path) -> None:
    file = data / "wikitext2" / "wiki.valid.raw"
    pages = pages_of_text(file="wikitext2/wiki.valid*.raw")["test"]["page"]
    assert pages == [" = First = \n One word . \n = = Part = = \n More . \n", " = Second = \n Two words . \n"]
    file.write_text("no title\n")
    with pytest.raises(UserError, match="no line ` = Title = `"):
        pages_of_text(file="wikitext2/wiki.valid*.raw")


@pytest.fixture(scope="module")
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")


def test_every_task_file_asks_what_it_should(harness: Any, data: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert set(manager.all_tasks) == {*ASKED, "gsm8k_local", "wikitext_local"}
    tasks: dict[str, Any] = manager.load(manager.all_tasks)["tasks"]
    for name, asked in ASKED.items():
        tasks[name].build_all_requests(limit=1)
        assert [request.args for request in tasks[name].instances] == list(asked), name
    tasks["gsm8k_local"].set_fewshot_seed(1234)
    tasks["gsm8k_local"].build_all_requests(limit=1)
    (request,) = tasks["gsm8k_local"].instances
    prompt, generation = request.args
    turns = prompt.split("\n\n")
    assert len(set(turns)) == 6
    assert turns[-1] == "Question: What is 0 + 1?\nAnswer:"
    assert all(turn.startswith("Question: What is ") and "\n#### " in turn for turn in turns[:-1])
    assert generation["until"] == ["Question:", "</s>", "<|im_end|>"]
    tasks["wikitext_local"].build_all_requests()
    assert [request.args for request in tasks["wikitext_local"].instances] == [
        (" = First =\nOne word.\n== Part ==\nMore.\n",), (" = Second =\nTwo words.\n",)
    ]  # fmt: skip


def test_right_answers_count(harness: Any, data: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    tasks: dict[str, Any] = manager.load(["winogrande_local", "gsm8k_local", "mmlu_local"])["tasks"]
    for task in tasks.values():
        task.build_all_requests(limit=1)

    def score(name: str, responses: Sequence[Any]) -> dict[str, float]:
        task = tasks[name]
        for request, response in zip(task.instances, responses, strict=True):
            request.resps = [response]
        task.apply_filters()
        doc = task.instances[0].doc
        key = next(iter(task.instances[0].filtered_resps))
        return task.process_results(doc, [request.filtered_resps[key] for request in task.instances])

    assert score("winogrande_local", [(-2.0, False), (-1.0, False)]) == {"acc": 1.0}
    assert score("winogrande_local", [(-1.0, False), (-2.0, False)]) == {"acc": 0.0}
    assert score("mmlu_local", [(-2.0, False), (-2.0, False), (-1.0, False), (-2.0, False)]) == {"acc": 1.0}
    assert score("gsm8k_local", ["So it is\n#### 1\n\n"]) == {"exact_match": 1.0}
    assert score("gsm8k_local", ["So it is 1"]) == {"exact_match": 0.0}
