"""Multiple choice: the contract's scores are those of a plain full forward, and a bad row is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BOUNDARIES, plans, policies
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.evaluation.multiple_choice import (
    Accuracy,
    Question,
    TokenQuestion,
    _log_likelihoods,
    encode_questions,
    measure_accuracy,
    read_questions,
)
from pdtrim_pl.models.pretrained import load_tokenizer
from pdtrim_pl.plan import Boundary, StagePlan
from pdtrim_pl.staged import StagedCausalLM

QUESTIONS = [
    Question("The sky is", ("blue", "made of old cheese"), 0),
    Question("Two and two make", ("three", "four", "a very large number", "5"), 1),
    Question("A", ("b", "c"), 1),
    Question("Water boils at a hundred degrees and freezes at", ("zero", "ten degrees", "once"), 0),
    Question("He said: yes.\nAnswer:", ("A", "B", "C", "D"), 3),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_tokenizer_dir))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=259, max_position_embeddings=96)


@pytest.fixture(scope="module")
def staged() -> StagedCausalLM:
    return StagedCausalLM(tiny_model("llama", vocab_size=259, max_position_embeddings=96))


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerBase) -> list[TokenQuestion]:
    return encode_questions(QUESTIONS, tokenizer, 96)


@torch.no_grad()
def plain_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question) -> list[float]:
    """The stock model over context and choice at once, one choice after the other."""
    start = len(tokenizer(question.context)["input_ids"])
    scores = []
    for choice in question.choices:
        ids = torch.tensor(tokenizer([f"{question.context} {choice}"])["input_ids"])
        log_probs = model(ids).logits[0, :-1].log_softmax(dim=-1)
        scores.append(float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return scores


@torch.no_grad()
def contract_scores(staged: StagedCausalLM, question: TokenQuestion, plan: StagePlan, policy: object) -> list[float]:
    """The teacher-forced pass for one choice alone."""
    scores = []
    for response in question.responses:
        targets = torch.tensor(response)
        out = staged(torch.tensor([question.prompt]), targets[None], plan=plan, policy=policy)
        scores.append(-float(F.cross_entropy(staged.logits(out.hidden[0]), targets, reduction="sum")))
    return scores


def scores_of(staged: StagedCausalLM, questions: list[TokenQuestion], plan: StagePlan, policy: object) -> list[float]:
    with torch.no_grad():
        rows = _log_likelihoods(staged, questions, plan, policy, 3, "cpu")  # type: ignore[arg-type]
    return [score for row in rows for score in row.tolist()]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_full_plan_scores_as_the_stock_model_does(
    model: PreTrainedModel, staged: StagedCausalLM, tokenizer: PreTrainedTokenizerBase,
    encoded: list[TokenQuestion], boundary: Boundary,
) -> None:  # fmt: skip
    expected = [score for question in QUESTIONS for score in plain_scores(model, tokenizer, question)]
    plan = replace(staged.plan, boundary=boundary)
    assert scores_of(staged, encoded, plan, None) == pytest.approx(expected, abs=1e-4)


@given(data=st.data())
@settings(max_examples=15)
def test_contexts_encoded_once_score_as_every_choice_alone(
    staged: StagedCausalLM, encoded: list[TokenQuestion], data: st.DataObject
) -> None:
    plan = replace(data.draw(plans(4)), model=staged.plan.model, merged={}, untied={})
    policy = data.draw(policies(plan, kv=staged.kv_shape))
    expected = [score for question in encoded for score in contract_scores(staged, question, plan, policy)]
    assert scores_of(staged, encoded, plan, policy) == pytest.approx(expected, abs=1e-4)


def test_accuracy_is_that_of_the_likeliest_choice_and_the_likeliest_by_letter(
    model: PreTrainedModel, staged: StagedCausalLM, tokenizer: PreTrainedTokenizerBase, encoded: list[TokenQuestion]
) -> None:
    plain = normalised = 0
    for question in QUESTIONS:
        scores = plain_scores(model, tokenizer, question)
        by_letter = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        plain += scores.index(max(scores)) == question.label
        normalised += by_letter.index(max(by_letter)) == question.label
    assert measure_accuracy(staged, encoded) == Accuracy(plain / 5, normalised / 5, 5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_neither_batch_size_nor_order_nor_chunks_matter(
    staged: StagedCausalLM, encoded: list[TokenQuestion], batch_size: int
) -> None:
    plan = staged.plan.drop("decode", 2)
    expected = measure_accuracy(staged, encoded, plan=plan)
    assert measure_accuracy(staged, encoded[::-1], plan=plan, batch_size=batch_size, chunk_tokens=1) == expected


def test_the_models_own_plan_counts_where_none_is_given(encoded: list[TokenQuestion]) -> None:
    staged = StagedCausalLM(tiny_model("llama", vocab_size=259, seed=3)).train()
    plan = staged.plan.drop("both", 1).drop("both", 2)
    given = measure_accuracy(staged, encoded, plan=plan)
    staged.apply_plan(plan)
    assert measure_accuracy(staged, encoded) == given
    assert staged.training, "its mode is its own again"


def test_the_split_is_that_of_the_joint_tokenisation() -> None:
    vocabulary = {"<pad>": 0, "a": 1, "b": 2, " ": 3, "c": 4, ". ": 5, ".": 6, " b": 7, ". c": 8}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "b"), (".", " "), (". ", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    plain, joined = encode_questions(
        [Question("a", ("b", "a"), 0), Question("a.", ("c", "a"), 0)], tokenizer, max_tokens=20
    )
    assert (plain.prompt, plain.responses) == ((1,), ((7,), (3, 1)))
    assert (joined.prompt, joined.responses) == ((1,), ((8,), (5, 1))), "the stop belongs to what follows it"


def test_a_long_context_loses_its_start_and_keeps_what_the_tokenizer_puts_first() -> None:
    alphabet = {letter: index for index, letter in enumerate("^abcdefgh ")}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="^")
    (question,) = encode_questions([Question("abcdefgh", ("ab", "c"), 1)], tokenizer, max_tokens=8)
    assert question.prompt == (0, 5, 6, 7, 8), "the same for every choice, with room for the longest"
    assert question.responses == ((9, 1, 2), (9, 3))
    assert (question.letters, question.label) == ((2, 1), 1)
    with pytest.raises(
        ValueError, match=r"'abcdefgh'\.\.\. has 8 tokens of context and choices of \[3, 2\], and 4 fit"
    ):
        encode_questions([Question("abcdefgh", ("ab", "c"), 1)], tokenizer, max_tokens=4)


def test_truncated_questions_fit_and_longer_ones_are_refused(
    staged: StagedCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = [Question("word " * 40 + "end", ("one", "fifteen"), 0)]
    assert measure_accuracy(staged, encode_questions(questions, tokenizer, 96)).questions == 1
    with pytest.raises(ValueError, match=r"takes 211 tokens, and the context of `model` is 96: .*`max_tokens`"):
        measure_accuracy(staged, encode_questions(questions, tokenizer, 500))


def test_questions_come_in_order_up_to_the_limit_and_other_keys_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"context": f"c{i}", "choices": ["x", "y"], "label": i % 2, "subject": "s"} for i in range(4)]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n" + "not read with a limit", encoding="utf-8")
    assert read_questions(path, 3) == [Question(f"c{i}", ("x", "y"), i % 2) for i in range(3)]
    with pytest.raises(ValueError, match=r"`limit` of questions is 0"):
        read_questions(path, 0)
    with pytest.raises(ValueError, match=r"q.jsonl, line 8: not valid JSON"):
        read_questions(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"line 2: holds a list, not an object"),
        ('{"choices": ["a", "b"], "label": 0}', r"line 2: `context` is None; give a text"),
        ('{"context": " ", "choices": ["a", "b"], "label": 0}', r"line 2: `context` is ' '; give a text"),
        (
            '{"context": "c", "choices": ["a"], "label": 0}',
            r"line 2: `choices` is \['a'\]; give a list of at least two",
        ),
        ('{"context": "c", "choices": ["a", ""], "label": 0}', r"line 2: `choices` is \['a', ''\]"),
        ('{"context": "c", "choices": ["a", "b"], "label": 2}', r"line 2: `label` is 2; give .* from 0 to 1"),
        ('{"context": "c", "choices": ["a", "b"], "label": true}', r"line 2: `label` is True"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "c", "choices": ["a", "b"], "label": 0}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    with pytest.raises(ValueError, match=r"cannot be read"):
        read_questions(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no question"):
        read_questions(path)
    path.write_bytes(b'\n{"context": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: is not UTF-8 \(byte 0xe9\); mend the row"):
        read_questions(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"cannot be read: .*utf-8"):
        read_questions(path)


def test_nothing_to_answer_and_no_batch_are_refused(staged: StagedCausalLM, encoded: list[TokenQuestion]) -> None:
    with pytest.raises(ValueError, match=r"no question to answer"):
        measure_accuracy(staged, [])
    with pytest.raises(ValueError, match=r"`batch_size` of the questions is 0"):
        measure_accuracy(staged, encoded, batch_size=0)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_the_standard_error_is_that_of_the_mean_of_right_and_wrong(right: list[bool]) -> None:
    hits = torch.tensor(right, dtype=torch.float64)
    accuracy = Accuracy(float(hits.mean()), 0.0, len(right))
    assert accuracy.stderr == pytest.approx(float(hits.std() / math.sqrt(len(right))), abs=1e-12)
    assert accuracy.normalised_stderr == 0.0


def test_one_question_has_no_standard_error() -> None:
    assert math.isnan(Accuracy(1.0, 1.0, 1).stderr)
