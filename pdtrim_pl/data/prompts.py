"""Text and chats to token ids, the same way for training and for serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("", "\n", ".")
"""Texts after which a response is tokenised to find how it goes on: many tokenizers start a text with a space."""


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself, such as Llama's; often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
    return list(full[:start])


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without the special tokens that a tokenizer adds by itself."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a raw prompt behind `leading_ids`; a token that the tokenizer puts after a text is left out."""
    return leading_ids(tokenizer) + plain_ids(tokenizer, [prompt])[0]


def joined_stop_ids(*told: object) -> tuple[int, ...]:
    """One rising tuple of token ids out of several `eos_token_id`, each a number, a list, or None."""
    ids = {token for entry in told for token in (entry if isinstance(entry, list | tuple) else [entry])}
    return tuple(sorted(token for token in ids if isinstance(token, int)))


def split_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokenise prompts and responses so that, joined, they decode to what the tokenizer makes of the whole text.

    Prompt and response are tokenised together. The prompt keeps the tokens that it has when it is served alone, and
    the response is the rest. Sometimes one token of the whole text reaches over the boundary: `is ` before `Paris`
    makes `is` and `▁Paris`, while the prompt that is served ends in `▁`. Then the response is tokenised as a
    continuation of the prompt (`Par`, `is`). Where a tokenizer has no such tokens, as WordPiece between `go` and `ing`,
    the token belongs to the response, and the prompt is one token shorter than when it is served.

    Returns:
        (prompt ids, response ids) of each pair, special tokens left to the caller.
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
        tokenizer: has a chat template.
        messages: `role` and `content`, the content a text.
        add_generation_prompt: let the text end where the answer of the assistant begins.

    Raises:
        UserError: the template refuses the messages, fails on them, or leaves out the last one's content.
    """
    text = _rendered(tokenizer, messages, add_generation_prompt)
    content = (messages[-1].get("content") or "").strip()
    if content and content not in text:
        # A template may change a text. If another one of the same length changes nothing, it left the text out.
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
    except Exception as error:  # a template is a program that somebody supplied: it can raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"does not fit the chat template ({type(error).__name__}: {reason})") from error
    assert isinstance(text, str)
    return text
