"""Accuracy on multiple-choice questions under a plan and a policy. The answer is the choice of highest likelihood.

Shapes: B questions of a batch, C choices of all questions of a batch, P longest prompt, R longest response, N response
tokens without padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import nan, sqrt
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example
from pdtrim_pl.data.files import read_lines
from pdtrim_pl.data.prompts import leading_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.losses import Head, chunks
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.staged import BlockKV, KVCache, Request, Slots, StagedCausalLM


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    context: str
    choices: tuple[str, ...]
    """Possible continuations of the context, after a space."""
    label: int
    """Index of the right choice."""


@dataclass(frozen=True)
class TokenQuestion:
    """A question in token ids."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    """One response for each choice; their lengths may differ."""
    letters: tuple[int, ...]
    """Length of every choice in characters, for the normalised accuracy."""
    label: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions that were answered right."""

    plain: float
    """Choices ranked by log-likelihood (`acc` of the lm-evaluation-harness)."""
    normalised: float
    """Choices ranked by log-likelihood per character (`acc_norm` of the lm-evaluation-harness)."""
    questions: int
    """Number of questions."""

    @property
    def stderr(self) -> float:
        """Standard error of `plain`; NaN for a single question."""
        return _stderr(self.plain, self.questions)

    @property
    def normalised_stderr(self) -> float:
        """Standard error of `normalised`; NaN for a single question."""
        return _stderr(self.normalised, self.questions)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read questions from JSON Lines or a JSON array of `{"context", "choices", "label"}`. Other keys are ignored.

    Args:
        path: the file.
        limit: number of questions to read, from the start; all by default.

    Raises:
        UserError: the file is missing or empty, or a row is not a question. The message names the line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit` of questions is {limit}: give at least 1, or none for all.")
    questions: list[Question] = []
    for line in read_lines(path):
        if len(questions) == limit:
            break
        if line.fault is not None:
            raise UserError(f"{path}, {line.place}: {line.fault}; mend the row.")
        questions.append(_question(line.row, f"{path}, {line.place}"))
    if not questions:
        raise UserError(f"{path} holds no question: give rows of `context`, `choices` and `label`.")
    return questions


def encode_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TokenQuestion]:
    """Tokenise each context together with each choice, and split them into prompt and responses.

    The prompt consists of the first tokens that the context and all `context + " " + choice` have in common. A token
    that crosses the end of the context goes to the responses. A prompt that is too long keeps its end, after the
    leading special tokens of the tokenizer.

    Args:
        questions: the questions.
        tokenizer: tokenizer of the model.
        max_tokens: maximum number of tokens of prompt and longest response together, at most the `usable_context` of
            the model.

    Raises:
        UserError: a choice has no tokens of its own, or leaves no room for a prompt.
    """
    leading = leading_ids(tokenizer)
    encoded = []
    for question in questions:
        texts = [question.context, *(f"{question.context} {choice}" for choice in question.choices)]
        rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        split = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False)))
        responses = tuple(tuple(row[split:]) for row in rows[1:])
        room = max_tokens - max(map(len, responses)) - len(leading)
        if room < 1 or not split or not all(responses):
            raise UserError(
                f"The question {question.context[:40]!r}... has {split} tokens of context and choices of "
                f"{[len(response) for response in responses]}, and {max_tokens} fit into the model: context and choice "
                "need at least one each. Drop the row."
            )
        prompt = (*leading, *rows[0][max(split - room, 0) : split])
        encoded.append(TokenQuestion(prompt, responses, tuple(map(len, question.choices)), question.label))
    return encoded


@torch.no_grad()
def measure_accuracy(
    model: StagedCausalLM, questions: Sequence[TokenQuestion], *, plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None, batch_size: int = 8, chunk_tokens: int = 128,
    device: torch.device | str = "cpu",
) -> Accuracy:  # fmt: skip
    """Answer questions under the contract of one request: the context is the prompt, every choice is a response.

    Prefill runs once for each context.

    Args:
        model: the model to evaluate.
        questions: result of `encode_questions`.
        plan: plan to run `model` under; its own plan and policy by default.
        policy: the policy to run under, if `plan` is given; None sends everything.
        batch_size: number of questions in one pass. The result does not depend on it.
        chunk_tokens: number of tokens whose logits are in memory at once.
        device: device of the model.

    Raises:
        UserError: there is no question, `batch_size` is below 1, or a question is longer than the model's context.
    """
    _check(model, questions, batch_size)
    if plan is None:
        plan, policy = model.plan, model.policy
    # Sorting by length keeps padding small.
    ordered = sorted(questions, key=lambda question: len(question.prompt))
    plain = normalised = 0
    with eval_mode(model):
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            scores = _log_likelihoods(model, part, plan, policy, chunk_tokens, device)
            for question, row in zip(part, scores, strict=True):
                plain += int(row.argmax()) == question.label
                normalised += int((row / torch.tensor(question.letters)).argmax()) == question.label
    return Accuracy(plain / len(questions), normalised / len(questions), len(questions))


def _log_likelihoods(
    model: StagedCausalLM, questions: Sequence[TokenQuestion], plan: StagePlan, policy: KVRetentionPolicy | None,
    chunk_tokens: int, device: torch.device | str,
) -> list[Tensor]:  # fmt: skip
    """For each question, the log-likelihoods of its choices, fp64 on the CPU."""
    sizes = [len(question.responses) for question in questions]
    batch = _batch(questions).on(device)
    owner = torch.repeat_interleave(torch.tensor(sizes)).to(device)  # the question of each choice, [C]
    first = (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)).to(device)
    request = Request.of(*batch.request, plan.boundary)
    tokens, valid = request.tokens, request.valid
    encoded = model.prefill(tokens["prefill"][first], valid["prefill"][first], plan=plan)
    parts = [encoded.hidden[owner, -1:]] if plan.boundary == "prefill" else []
    if tokens["decode"].shape[1]:
        cache = _repeated(encoded.cache.retained(policy), owner)
        out = model.decode(tokens["decode"], cache, valid["decode"], plan=plan, keep_cache=False)
        parts.append(out.hidden)
    hidden = torch.cat(parts, dim=1)[batch.response_mask]
    nll = _token_nll(hidden, batch.response_ids[batch.response_mask], model.logits, chunk_tokens)
    lengths = batch.response_mask.sum(dim=1).tolist()
    sums = torch.stack([-row.double().sum() for row in nll.split(lengths)]).cpu()
    return list(sums.split(sizes))


def _token_nll(hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int) -> Tensor:
    """Negative log-likelihood of each token, fp32: hidden states [N, H] and targets [N] -> [N]."""
    parts = [
        F.cross_entropy(head(hidden[part]).float(), targets[part], reduction="none")
        for part in chunks(len(targets), chunk_tokens)
    ]
    return torch.cat(parts)


def _batch(questions: Sequence[TokenQuestion]) -> Batch:
    """A batch with one row for each choice: prompts [C, P] and responses [C, R]."""
    examples = [
        Example(torch.tensor(question.prompt), torch.tensor(response))
        for question in questions
        for response in question.responses
    ]
    return Collator(pad_id=0)(examples)


def _repeated(cache: KVCache, rows: Tensor) -> KVCache:
    """The cache of some rows, [C]; rows may repeat. Blocks that shared their slots still share them."""
    slots: dict[int, Slots] = {}
    blocks: dict[int, BlockKV] = {}
    for index, block in cache.blocks.items():
        if id(block.slots) not in slots:
            slots[id(block.slots)] = Slots(block.slots.positions[rows], block.slots.valid[rows])
        blocks[index] = BlockKV(block.keys[rows], block.values[rows], slots[id(block.slots)])
    return KVCache(blocks, cache.lengths[rows])


def _check(model: StagedCausalLM, questions: Sequence[TokenQuestion], batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"`batch_size` of the questions is {batch_size}: give at least 1.")
    if not questions:
        raise UserError("There is no question to answer.")
    context = usable_context(model.model.config.to_dict())
    longest = max(len(question.prompt) + max(map(len, question.responses)) for question in questions)
    if longest > context:
        raise UserError(
            f"A question takes {longest} tokens, and the context of `model` is {context}: encode the questions with "
            f"`max_tokens` of {context} or less."
        )


def _question(row: Mapping[str, Any], place: str) -> Question:
    context, choices, label = row.get("context"), row.get("choices"), row.get("label")
    if not _is_text(context):
        raise UserError(f"{place}: `context` is {context!r}; give a text that is not empty.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(f"{place}: `choices` is {choices!r}; give a list of at least two texts, none empty.")
    if type(label) is not int or not 0 <= label < len(choices):
        raise UserError(f"{place}: `label` is {label!r}; give the right choice's index, from 0 to {len(choices) - 1}.")
    return Question(context, tuple(choices), label)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _stderr(share: float, questions: int) -> float:
    return sqrt(share * (1.0 - share) / (questions - 1)) if questions > 1 else nan
