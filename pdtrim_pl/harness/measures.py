"""Measures of generation beside the tasks: agreement with the dense model, a second turn of a chat, recall by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from pdtrim_pl.data import Example
from pdtrim_pl.data.prompts import chat_text, leading_ids, plain_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.recall import RECALL_MARGIN, repetition
from pdtrim_pl.harness.figures import Documents, Scored
from pdtrim_pl.harness.in_process import InProcessPair, Rows
from pdtrim_pl.harness.material import Material

Measure = Literal["agreement", "second_turn", "recall"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a passage stands among the other tokens of a prompt: 0 at its start, 1 at its end."""
PASSAGE = 32
"""Tokens of a passage that is to be found again. Its first quarter ends the prompt, see `repetition`."""
FOLLOW_UP = "Now say the same in other words."
"""The second message of a user."""


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure, and on which text.

    Raises:
        UserError: an unknown measure, or a number out of range.
    """

    names: Sequence[str] = ()
    """Of `MEASURES`."""
    source: str = "pydoc"
    """The text; see `TextSource.path`."""
    examples: int = 16
    """Prompts of agreement and of the second turn, and passages at each depth of recall."""
    new_tokens: int = 64
    """Tokens that continue a prompt."""
    prompts: Sequence[int] = (256, 1024)
    """Lengths of the prompts of recall; the first is also that of the prompts of agreement."""
    margin: float = RECALL_MARGIN
    """Share of its recall that the policy may lose before the report warns."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in MEASURES]:
            raise UserError(f"`measures` names {', '.join(unknown)}: choose of {', '.join(MEASURES)}.")
        if self.examples < 1 or self.new_tokens < 1 or min(self.prompts, default=0) < 2 * PASSAGE:
            raise UserError(f"`examples` needs 1 at least, and every one of `prompts` {2 * PASSAGE}.")


@dataclass(eq=False)
class Measures:
    """Measures models on the same requests. The dense model comes first: its answers are what the others are held to.

    Args:
        settings: what to measure.
        tokenizer: that of the pair.
        export: the directory of the pair, whose tokenizer cuts the text.
        context: most tokens of a request.
        stop_ids: tokens that end a continuation.
        batch_size: requests that run together.

    Raises:
        UserError: there is too little text, a prompt exceeds the context, or there is no chat template.
    """

    settings: MeasureSettings
    tokenizer: PreTrainedTokenizerBase
    export: Path
    context: int
    stop_ids: tuple[int, ...]
    batch_size: int = 8
    _answers: dict[Measure, tuple[Rows, Rows]] = field(default_factory=dict)
    """Measure -> prompts, and the dense model's continuations."""

    def __post_init__(self) -> None:
        settings = self.settings
        longest = self.context - settings.new_tokens
        if max(settings.prompts) > self.context - PASSAGE or settings.prompts[0] > longest:
            raise UserError(f"`prompts` are {list(settings.prompts)}, and the model's context is {self.context}.")
        if "second_turn" in settings.names and self.tokenizer.chat_template is None:
            raise UserError("`measures`: second_turn needs a chat template, which this tokenizer lacks. Leave it out.")
        lengths = settings.prompts if "recall" in settings.names else ()
        self.material = Material.read(
            str(self.export / "prefill"), settings.source, settings.examples, settings.prompts[0],
            stream=max(lengths, default=0) + settings.examples * PASSAGE,
        )  # fmt: skip
        self.leading = leading_ids(self.tokenizer)

    def dense(self, model: InProcessPair) -> list[Scored]:
        """Measure the dense model, and keep its continuations."""
        if "agreement" in self.settings.names:
            prompts = self.material.prompts
            self._answers["agreement"] = prompts, self._continuations(model, prompts)
        if "second_turn" in self.settings.names:
            prompts = self._second_turns(model)
            self._answers["second_turn"] = prompts, self._continuations(model, prompts)
        return self.of(model, {name: answers for name, (_, answers) in self._answers.items()})

    def of(self, model: InProcessPair, known: Mapping[Measure, Rows] | None = None) -> list[Scored]:
        """Measure a model.

        Args:
            model: the model.
            known: its own continuations, if it is the dense model.
        """
        found = []
        for name, (prompts, answers) in self._answers.items():
            own = self._continuations(model, prompts) if known is None else known[name]
            pairs = list(zip(answers, own, strict=True))
            equal = {str(at): (float(_equal(*pair)), float(len(pair[0]))) for at, pair in enumerate(pairs)}
            same = {str(at): (float(_common(*pair)), float(len(pair[0]))) for at, pair in enumerate(pairs)}
            found += [
                Scored.of(name, "tokens until the first difference, share", "measure", Documents(same)),
                Scored.of(name, "equal tokens, share", "measure", Documents(equal)),
            ]
        return found + (self.recall(model) if "recall" in self.settings.names else [])

    def recall(self, model: InProcessPair) -> list[Scored]:
        """Share of the tokens of a passage that a model finds again, by prompt length and depth, and over all."""
        found, whole = [], {str(at): (0.0, 0.0) for at in range(self.settings.examples)}
        for length in self.settings.prompts:
            for depth in DEPTHS:
                examples = [self._passage(at, length, depth) for at in range(self.settings.examples)]
                values = {str(at): pair for at, pair in enumerate(self._recalled(model, examples))}
                name = f"prompt of {length}, depth {100 * depth:g} %"
                found.append(Scored.of("recall", name, "measure", Documents(values)))
                for at, (right, tokens) in values.items():
                    whole[at] = (whole[at][0] + right, whole[at][1] + tokens)
        return [Scored.of("recall", "all lengths and depths", "measure", Documents(whole)), *found]

    def _passage(self, at: int, length: int, depth: float) -> Example:
        """The request of one passage: a prompt of `length` tokens that holds it at `depth`, and its repetition."""
        passage = self.material.passage(at, PASSAGE)
        room = length - len(self.leading) - PASSAGE - PASSAGE // 4
        others = self.material.others(at, room, self.settings.examples * PASSAGE)
        example = repetition(passage, others, round(depth * len(others)))
        return example._replace(prompt=torch.cat([torch.tensor(self.leading, dtype=torch.int64), example.prompt]))

    def _recalled(self, model: InProcessPair, examples: Sequence[Example]) -> list[tuple[float, float]]:
        """Right tokens and all tokens of each response."""
        counts = []
        for start in range(0, len(examples), self.batch_size):
            part = examples[start : start + self.batch_size]
            responses = [example.response.tolist() for example in part]
            logits = model.response_logits([example.prompt.tolist() for example in part], responses)
            for response, row in zip(responses, logits, strict=True):
                right = row.argmax(dim=-1).cpu() == torch.tensor(response)
                counts.append((float(right.sum()), float(len(response))))
        return counts

    def _continuations(self, model: InProcessPair, prompts: Rows) -> list[list[int]]:
        """Greedy continuations, each up to its first stop token."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.batch_size):
            part = prompts[start : start + self.batch_size]
            found += model.continuations(part, room=self.settings.new_tokens, stop_ids=self.stop_ids)
        return found

    def _second_turns(self, model: InProcessPair) -> list[list[int]]:
        """Prompts of a second turn: a user's text, the dense model's answer, and `FOLLOW_UP`."""
        texts = [self._text(prompt) for prompt in self.material.prompts]
        openings = [[{"role": "user", "content": text}] for text in texts]
        answers = self._continuations(model, self._rendered(openings))
        chats = [
            [*opening, {"role": "assistant", "content": self._text(answer)}, {"role": "user", "content": FOLLOW_UP}]
            for opening, answer in zip(openings, answers, strict=True)
        ]
        longest = self.context - self.settings.new_tokens
        return [prompt[-longest:] for prompt in self._rendered(chats)]

    def _rendered(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int]]:
        texts = [chat_text(self.tokenizer, chat, add_generation_prompt=True) for chat in chats]
        return plain_ids(self.tokenizer, texts)

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _equal(dense: Sequence[int], own: Sequence[int]) -> int:
    """Places of the dense continuation at which both have the same token."""
    return sum(a == b for a, b in zip(dense, own, strict=False))


def _common(dense: Sequence[int], own: Sequence[int]) -> int:
    """Tokens before the first difference."""
    equal = [a == b for a, b in zip(dense, own, strict=False)]
    return next((at for at, same in enumerate(equal) if not same), len(equal))
