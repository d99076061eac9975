"""A model's own responses to a user's prompts, as a data set: a student then learns on text of its teacher."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pdtrim_pl.data.chats import chat_ids, message_of
from pdtrim_pl.data.files import read_prompts
from pdtrim_pl.data.prompts import prompt_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.loading import DType, dtype_of, warn_of_slow_bf16
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer, usable_config
from pdtrim_pl.plan.json_files import read_json, write_whole
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import stop_ids_of

log = logging.getLogger(__name__)

FORMAT = "pdtrim.answers/1"
WINDOW = 8
"""Batches that are sorted by length together, and written together."""


@dataclass(frozen=True)
class AnswerSettings:
    """How prompts are answered.

    Raises:
        UserError: a number is out of range.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    chat: bool = False
    """Whether a `prompt` is a user's message."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}: give at least 1.")


def answer_file(
    model: str, prompts: Path, output: Path, settings: AnswerSettings = AnswerSettings(), *, dtype: DType = "auto",
    device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Write a model's responses to the prompts of a file, one JSON row each; `data.source.path` reads the result.

    A row with `prompt` becomes `prompt` and `response`, one with `messages` gets an assistant message at its end; an
    assistant message that is there already is answered anew. `finish_reason` is `stop`, or `length` if the response was
    cut. Rows that are there already are kept: a command that was killed goes on when it is given again, and leaves what
    an uninterrupted one leaves.

    Args:
        model: name, path or Hub id.
        prompts: JSON rows with `prompt` or `messages`.
        output: the file to write, JSON lines. Beside it a file that ends in `.origin` says what made it.
        settings: how prompts are answered.
        dtype: element type of the model.
        device: where it runs.

    Returns:
        The number of rows in the output.

    Raises:
        UserError: a row cannot be used, a prompt is too long, or the output comes from another model, file or setting.
    """
    rows = read_prompts(prompts)
    tokenizer = load_tokenizer(model)
    asked = [_Asked.of(said, place, tokenizer, settings.chat) for place, said in rows]
    context = usable_context(usable_config(model).to_dict())
    for (place, _), one in zip(rows, asked, strict=True):
        if len(one.ids) + settings.max_new_tokens > context:
            raise UserError(
                f"{place}: prompt and `max_new_tokens` take {len(one.ids) + settings.max_new_tokens} tokens, and the "
                f"context of `model` is {context}. Shorten the prompt, or lower `max_new_tokens`."
            )
    there = _begun(output, _origin(model, prompts, settings, dtype), len(asked))
    if there == len(asked):
        return len(asked)
    whole = load_causal_lm(model, dtype=dtype_of(dtype))
    torch.nn.Module.to(whole, torch.device(device))
    staged = StagedCausalLM(whole.eval())
    warn_of_slow_bf16(staged.model.device, staged.model.dtype)
    pair, stops = InProcessPair.of(staged), stop_ids_of(staged.model, tokenizer)
    size = settings.batch_size * WINDOW
    with output.open("a", encoding="utf-8") as out:
        for first in range(there, len(asked), size):
            window = asked[first : first + size]
            for one, ids in zip(window, _answered(pair, window, settings, stops, first), strict=True):
                out.write(json.dumps(one.answered(tokenizer, ids, stops), ensure_ascii=False) + "\n")
            out.flush()
            log.info("%d of %d prompts answered", min(first + size, len(asked)), len(asked))
    return len(asked)


@dataclass(frozen=True)
class _Asked:
    """One prompt."""

    ids: list[int]
    given: Mapping[str, Any]
    """The row of the answer, but for the answer."""

    @classmethod
    def of(cls, said: str | list[Any], place: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> _Asked:
        if isinstance(said, str) and not chat:
            return cls(prompt_ids(tokenizer, said), {"prompt": said})
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if tokenizer.chat_template is None:
            raise UserError(f"{place}: `model` has no chat template. Give rows with `prompt`, without `--chat`.")
        try:
            turns = list(map(message_of, messages))
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            return cls(chat_ids(tokenizer, turns), {"messages": turns})
        except ValueError as error:
            raise UserError(f"{place}: `messages` {error}.") from error

    def answered(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> dict[str, Any]:
        """The row with its answer."""
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        reason = {"finish_reason": "stop" if ids and ids[-1] in stops else "length"}
        if "prompt" in self.given:
            return {**self.given, "response": text, **reason}
        return {"messages": [*self.given["messages"], {"role": "assistant", "content": text}], **reason}


def _answered(
    pair: InProcessPair, asked: Sequence[_Asked], settings: AnswerSettings, stops: Sequence[int], first: int
) -> list[list[int]]:
    """Token ids of the responses. Prompts of like lengths run together.

    Args:
        pair: the model.
        asked: the prompts.
        settings: how they are answered.
        stops: tokens that end a response.
        first: number of the first prompt in the file. Draws depend on it, so that a continued file equals another.
    """
    found: dict[int, list[int]] = {}
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].ids))
    for start in range(0, len(order), settings.batch_size):
        members = order[start : start + settings.batch_size]
        sampling = replace(settings.sampling, seed=settings.sampling.seed + first + start)
        rows = pair.continuations(
            [asked[index].ids for index in members], room=settings.max_new_tokens, stop_ids=stops,
            pick=sampling.picker(),
        )  # fmt: skip
        found.update(zip(members, rows, strict=True))
    return [found[index] for index in range(len(asked))]


def _origin(model: str, prompts: Path, settings: AnswerSettings, dtype: DType) -> dict[str, Any]:
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
    return {"format": FORMAT, "model": model, "dtype": dtype, "prompts_sha256": digest, **asdict(settings)}


def _begun(output: Path, origin: Mapping[str, Any], rows: int) -> int:
    """Number of rows, of `rows`, that an earlier command left in whole windows. What follows them is cut off.

    Raises:
        UserError: they come from something else.
    """
    told = output.with_name(f"{output.name}.origin")
    if not output.exists():
        write_whole(told, json.dumps(origin, indent=2) + "\n")
        output.touch()
        return 0
    before = read_json(told, "origin of the answers") if told.is_file() else {}
    if differing := [name for name, value in origin.items() if before.get(name) != value]:
        raise UserError(
            f"{output} exists, and was made with other settings than asked for now: {', '.join(differing)} "
            f"({told.name}). Name another `output`, or remove both files."
        )
    data = output.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    window = origin["batch_size"] * WINDOW
    whole = rows if len(ends) >= rows else len(ends) // window * window
    with output.open("r+b") as file:
        file.truncate(ends[whole - 1] if whole else 0)
    return whole
