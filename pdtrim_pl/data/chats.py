"""Turn chats, in OpenAI's or ShareGPT's format, into a prompt and a response."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from pdtrim_pl.data.prompts import chat_text, plain_ids
from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_ROLES = ("system", "user", "assistant", "tool")


def split_chat(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Any]) -> tuple[str, str, float | None]:
    """Split a chat into a prompt and a response, both as text, and the `weight` that its message gives, if any.

    The response is the answer of the last assistant message, with its end-of-turn token. The prompt is everything
    before it.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat: messages of `{role, content}` or `{from, value}`. Content is a text or a list of text parts. Other keys,
            such as `tool_calls`, are passed to the template unchanged.

    Raises:
        UserError: the chat cannot be used. The message is the end of a sentence that starts with the column's name.
    """
    messages = [message_of(turn) for turn in chat]
    last = max((number for number, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise UserError("has no assistant message after a first message of another role")
    answer = messages[last]["content"]
    if not (answer or "").strip():
        raise UserError("has an empty last assistant message")
    prompt = chat_text(tokenizer, messages[:last], add_generation_prompt=True)
    whole = chat_text(tokenizer, messages[: last + 1], add_generation_prompt=False)
    # Some templates begin the answer differently from the generation prompt, for example with a thinking block.
    response = whole.removeprefix(prompt) if whole.startswith(prompt) else answer
    return prompt, response.rstrip(), _weight(messages[last])


def assistant_turns(chat: Sequence[Any]) -> list[Sequence[Any]]:
    """A chat up to each message of the assistant that has something before it and says something.

    The chat alone if there is no such message: `split_chat` then says why.

    Raises:
        UserError: something in it is no message.
    """
    said = [message_of(turn) for turn in chat]
    ends = [
        number + 1
        for number, turn in enumerate(said)
        if number and turn["role"] == "assistant" and (turn["content"] or "").strip()
    ]
    return [chat[:end] for end in ends] or [chat]


def _weight(message: Mapping[str, Any]) -> float | None:
    weight = message.get("weight")  # a table gives every message the keys of all others, with None
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < inf:
        raise UserError(f"has a message with the weight {weight!r}; give a number of at least 0")
    return float(weight)


def system_text(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Any]) -> str:
    """The text of the system messages that begin a chat, as the template renders them; empty if there are none.

    It is also empty if the template does not render them alone.
    """
    messages = [message_of(turn) for turn in chat]
    count = next((number for number, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    if count == 0:
        return ""
    try:
        return chat_text(tokenizer, messages[:count], add_generation_prompt=False)
    except ValueError:  # some templates want a user's message
        return ""


def chat_ids(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Any]) -> list[int]:
    """The prompt's token ids of a chat that the assistant is to answer.

    Raises:
        UserError: the chat cannot be used. The message is the end of a sentence that starts with the column's name.
    """
    text = chat_text(tokenizer, list(map(message_of, chat)), add_generation_prompt=True)
    return plain_ids(tokenizer, [text])[0]


def message_of(turn: Any) -> dict[str, Any]:
    """A message in OpenAI's or ShareGPT's format as `{role, content}`, its content one text; other keys stay.

    Raises:
        UserError: it is none. The message is the end of a sentence that starts with the column's name.
    """
    if not isinstance(turn, Mapping):
        raise UserError(f"holds a {type(turn).__name__} where a message belongs")
    if turn.get("role") is None and turn.get("from") is not None:
        role = _SHAREGPT_ROLES.get(turn["from"], turn["from"])
        if role not in _ROLES:
            raise UserError(f"has a message from {turn['from']!r}; known are `human`, `gpt`, `system` and `tool`")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        message = {"role": role, "content": turn.get("value"), **rest}
    else:
        message = dict(turn)
    if not isinstance(message.get("role"), str):
        raise UserError("must hold messages with `role` and `content` (or `from` and `value`)")
    message["content"] = _content(message.get("content"))
    if message["content"] is None and message["role"] != "assistant":  # a message with tool calls may have none
        raise UserError(f"must hold messages with `role` and `content`, and one of `{message['role']}` has no content")
    return message


def _content(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"has a message whose content is a {type(content).__name__}, not a text")
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", None) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UserError(f"has a content part of type `{kind}`; only text can be used")
