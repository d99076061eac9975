"""Tokenise text and chats in the same way for training and for serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("", "\n", ".")
"""Texts put before a response to tokenise it as a continuation: many tokenizers add a space at the start of a text."""


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer adds before every text, such as Llama's; often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
    return list(full[:start])


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without the special tokens that the tokenizer adds."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a raw prompt: `leading_ids`, then the text. Special tokens at the end are not added."""
    return leading_ids(tokenizer) + plain_ids(tokenizer, [prompt])[0]


def joined_stop_ids(*settings: object) -> tuple[int, ...]:
    """Join several values of `eos_token_id` (a number, a list or None each) into one ascending tuple of token ids."""
    ids = {token for entry in settings for token in (entry if isinstance(entry, list | tuple) else [entry])}
    return tuple(sorted(token for token in ids if isinstance(token, int)))


def split_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokenise prompts and responses so that prompt and response together decode to the whole text.

    Prompt and response are tokenised together. The prompt gets the tokens that it has in serving, where it stands
    alone; the response gets the rest. Sometimes a token of the whole text crosses the boundary. Example: `is ` followed
    by `Paris` becomes `is`, `▁Paris`, but the prompt alone ends in `▁`. Then the response is tokenised as a
    continuation of the prompt: `Par`, `is`. Some tokenizers have no tokens for that (WordPiece between `go` and `ing`).
    Then the token that crosses the boundary goes to the response, and the prompt ends earlier than in serving.

    Returns:
        (prompt ids, response ids) of each pair, without special tokens.
    """
    joint = plain_ids(tokenizer, [prompt + response for prompt, response in pairs])
    alone = plain_ids(tokenizer, [prompt for prompt, _ in pairs])
    return [
        (prompt, whole[len(prompt) :])
        if whole[: len(prompt)] == prompt
        else _split_token(tokenizer, prompt, whole, response)
        for prompt, whole, (_, response) in zip(alone, joint, pairs, strict=True)
    ]


def _split_token(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], whole: list[int], response: str
) -> tuple[list[int], list[int]]:
    """Split `whole`, the ids of prompt and response, where one of its tokens crosses the boundary."""
    expected = _decoded(tokenizer, whole)
    for anchor in _ANCHORS:
        before, after = plain_ids(tokenizer, [anchor, anchor + response])
        if after[: len(before)] == before:
            rest = after[len(before) :]
            if _decoded(tokenizer, prompt + rest) == expected:
                return prompt, rest
    common = next(index for index, token in enumerate([*prompt, None]) if whole[index : index + 1] != [token])
    return whole[:common], whole[common:]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Put messages into the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: messages of `role` and `content`; the content is a text.
        add_generation_prompt: end the text where the answer of the assistant begins.

    Raises:
        UserError: the template refuses the messages, fails on them, or leaves out the content of the last message.
    """
    text = _rendered(tokenizer, messages, add_generation_prompt)
    content = (messages[-1].get("content") or "").strip()
    if content and content not in text:
        # A template may alter the content. If other content gives the same text, the template left the content out.
        other = {**messages[-1], "content": "0" * len(messages[-1]["content"])}
        if _rendered(tokenizer, [*messages[:-1], other], add_generation_prompt) == text:
            raise UserError(
                f"does not fit the chat template: it does not render string content (of `{messages[-1]['role']}`). It "
                "may want content parts; give the tokenizer a template that renders text"
            )
    return text


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    copies = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(copies, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program from the tokenizer's author: it can raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"does not fit the chat template ({type(error).__name__}: {reason})") from error
    assert isinstance(text, str)
    return text
