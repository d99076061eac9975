"""Bodies of OpenAI's completions and chat completions as requests to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from pdtrim_pl.data.chats import chat_ids
from pdtrim_pl.data.prompts import prompt_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.engine.requests import Ask
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},),
}  # fmt: skip
"""Settings that change the answer, and the values at which they do not. At others a request is refused."""
DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI's; a chat may fill the context."""


@dataclass(frozen=True)
class Body:
    """A checked body."""

    prompts: list[list[int]]
    """Token ids; a completion may ask for several at once."""
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends with its usage."""

    def ask(self, at: int, pair: ExportedPair, stop_ids: tuple[int, ...], deadline: float | None) -> Ask:
        """The request of one prompt.

        Raises:
            UserError: the model cannot hold it.
        """
        prompt = self.prompts[at]
        room = max(pair.context - len(prompt), 1)
        tokens = room if self.max_tokens is None else self.max_tokens
        pair.check_prompt(len(prompt), tokens, "max_tokens")
        return Ask(prompt, tokens, stop_ids, self.sampling, deadline)


def completion(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Body:
    """Read the body of `/v1/completions`.

    Raises:
        UserError: it asks for something that cannot be served.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompts = [prompt_ids(tokenizer, prompt)]
    elif _are(prompt, int):
        prompts = [list(prompt)]
    elif _are(prompt, str):
        prompts = [prompt_ids(tokenizer, each) for each in prompt]
    elif isinstance(prompt, list) and prompt and all(_are(each, int) for each in prompt):
        prompts = [list(each) for each in prompt]
    else:
        raise UserError("`prompt` must be a text, a list of texts, or token ids.")
    return _body(body, prompts, _number(body, "max_tokens", int, DEFAULT_TOKENS))


def chat(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Body:
    """Read the body of `/v1/chat/completions`.

    Raises:
        UserError: it asks for something that cannot be served.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("`messages` must be a list of messages.")
    if tokenizer.chat_template is None:
        raise UserError("This pair's tokenizer has no chat template: use /v1/completions.")
    try:
        prompt = chat_ids(tokenizer, messages)
    except UserError as error:
        raise UserError(f"`messages` {error}.") from error
    most = _number(body, "max_completion_tokens", int, _number(body, "max_tokens", int, None))
    return _body(body, [prompt], most)


def _body(body: Mapping[str, Any], prompts: list[list[int]], max_tokens: int | None) -> Body:
    wrong = [name for name, values in NEUTRAL.items() if body.get(name) not in (None, *values)]
    if wrong:
        raise UserError(f"This server does not know {', '.join(f'`{name}`' for name in wrong)}: leave it out.")
    stop = body.get("stop")
    stops = (stop,) if isinstance(stop, str) else stop or ()
    if not all(isinstance(each, str) and each for each in stops):
        raise UserError("`stop` must be a text or a list of texts, none empty.")
    sampling = Sampling(
        _number(body, "temperature", float, 1.0), _number(body, "top_k", int, None) or None,
        _number(body, "seed", int, 0), _number(body, "top_p", float, 1.0),
    )  # fmt: skip
    options = body.get("stream_options") or {}
    return Body(
        prompts, max_tokens, sampling, tuple(stops), bool(body.get("stream")), bool(options.get("include_usage"))
    )


def _number(body: Mapping[str, Any], name: str, kind: type[int] | type[float], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"`{name}` is {value!r}: give a number.")
    return kind(value)


def _are(value: object, kind: type) -> TypeGuard[list[Any]]:
    """Whether it is a list of values of one kind, not empty."""
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)
