"""Responses to a file of prompts: many at once, written in the order of the prompts."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pdtrim_pl.data.chats import chat_ids
from pdtrim_pl.data.files import read_prompts
from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.devices import devices_of
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask
from pdtrim_pl.serving.engine.response import Ended, Heard, Response
from pdtrim_pl.serving.generate import decoded, encode_prompt, load_export_tokenizer, stop_ids_of
from pdtrim_pl.serving.sampling import Sampling


@dataclass(frozen=True)
class FileSettings:
    """How the prompts of a file are answered."""

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    chat: bool = False
    """Whether a `prompt` is a user's message."""
    deadline: float | None = None
    """Seconds for one request, from when it is queued."""
    max_batch: int = 8


def generate_file(export: Path, prompts: Path, settings: FileSettings, *, device: str = "auto", out: TextIO) -> None:
    """Answer every row of a file. Writes a line of JSON for each: `text`, `tokens`, `finish_reason`, or `error`.

    Args:
        export: directory of the pair.
        prompts: JSON rows with `prompt` or `messages`.
        settings: how they are answered.
        device: see `devices_of`.
        out: receives the lines.

    Raises:
        UserError: the file has no such rows, or a setting cannot be served.
        RuntimeError: the workers failed.
    """
    tokenizer = load_export_tokenizer(export)
    stop_ids = stop_ids_of(export, tokenizer)
    asked = [_prompt(tokenizer, said, place, settings.chat) for place, said in read_prompts(prompts)]
    most = 2 * settings.max_batch
    with Engine(export, devices=devices_of(device), max_batch=settings.max_batch, max_waiting=most) as engine:
        for ids in asked:
            engine.pair.check_prompt(len(ids), settings.max_new_tokens)

        def started(ids: list[int]) -> Heard:
            ask = Ask(ids, settings.max_new_tokens, stop_ids, settings.sampling, settings.deadline)
            heard = Heard()
            Response(engine, ask, lambda tokens: decoded(tokenizer, tokens), settings.stop, heard.put)
            return heard

        running: deque[Heard] = deque()
        for ids in asked:
            if len(running) == most:
                _write(running.popleft(), out)
            running.append(started(ids))
        for heard in running:
            _write(heard, out)


def _write(heard: Heard, out: TextIO) -> None:
    *pieces, end = heard
    assert isinstance(end, Ended)
    row: dict[str, Any] = {"text": "".join(map(str, pieces)), "tokens": end.tokens, "finish_reason": end.reason}
    out.write(json.dumps({**row, **({"error": end.message} if end.message else {})}, ensure_ascii=False) + "\n")
    out.flush()


def _prompt(tokenizer: Any, said: str | list[Any], place: str, chat: bool) -> list[int]:
    if isinstance(said, str):
        return encode_prompt(tokenizer, said, chat=chat)
    try:
        return chat_ids(tokenizer, said)
    except UserError as error:
        raise UserError(f"{place}: `messages` {error}.") from error
