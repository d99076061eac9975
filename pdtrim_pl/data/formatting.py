"""Rows of a source to prompts and responses in tokens."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.data.examples import TokenExamples
from pdtrim_pl.data.settings import Lengths
from pdtrim_pl.data.sources import Rows

Tokenized = Mapping[str, Sequence[Sequence[int]]]


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, lengths: Lengths, seed: int) -> TokenExamples:
    """Tokenise a source and make its examples.

    Raw text: the tokens of all documents, with the end-of-sequence token between them, are cut into windows of
    `lengths.max_length` tokens that do not overlap; each window's split point is drawn by a generator of its own.
    Pairs and chats: a long prompt keeps its end, a long response its start.

    Args:
        rows: The source.
        tokenizer: Its leading special tokens (a beginning-of-sequence token, where it adds one by itself) start every
            prompt and every window.
        lengths: The lengths in tokens.
        seed: Seed of the split points.

    Raises:
        ValueError: A row cannot be read, or the text is shorter than one window; the message names the place.
    """
    if rows.kind == "text":
        documents = _tokenize(rows, tokenizer, _text_ids)
        return _windows(rows, documents.with_format("numpy")["ids"], tokenizer, lengths, seed)
    tokenized = _tokenize(rows, tokenizer, _pair_ids if rows.kind == "pairs" else _chat_ids)
    return TokenExamples.from_pairs(_truncated(rows, tokenized, tokenizer, lengths))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself, such as Llama's; often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
    return list(full[:start])


def _column(rows: Rows, batch: Mapping[str, Any], indices: Sequence[int], column: str) -> Sequence[Any]:
    """The values of a column, none of them empty or of another type than the column's use says."""
    wanted = list if rows.kind == "chat" else str
    for index, value in zip(indices, batch[column], strict=True):
        if not isinstance(value, wanted):
            found = "nothing" if value is None else f"a {type(value).__name__}"
            raise _fault(rows, index, column, f"holds {found}, not a {wanted.__name__}")
        # Empty lines between the paragraphs of a text do no harm.
        if rows.kind != "text" and not (value.strip() if isinstance(value, str) else value):
            raise _fault(rows, index, column, "is empty")
    return batch[column]


def _fault(rows: Rows, index: int, column: str, problem: str) -> ValueError:
    return ValueError(f"{rows.where(index)}: column `{column}` {problem}; mend or drop the row.")


def _tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, function: Callable[..., Tokenized]) -> Dataset:
    """Run `function` over all rows with `Dataset.map`.

    The cache on disk is keyed by what decides the result. A tokenizer's own hash does not do: it changes with use.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(vocabulary)
    key = [rows.dataset._fingerprint, function.__name__, rows.columns, backend, tokenizer.special_tokens_map]
    key += [tokenizer.chat_template, leading_ids(tokenizer)]
    return rows.dataset.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=list(rows.columns),
        fn_kwargs={"rows": rows, "tokenizer": tokenizer},
        new_fingerprint=Hasher.hash(key),
        desc="Tokenising",
    )


def _text_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    return {"ids": _plain(tokenizer, _column(rows, batch, indices, rows.columns[0]))}


def _pair_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    prompts, responses = (_plain(tokenizer, _column(rows, batch, indices, column)) for column in rows.columns)
    leading = leading_ids(tokenizer)
    return {"prompt": [leading + ids for ids in prompts], "response": [_ended(tokenizer, ids) for ids in responses]}


def _chat_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    chats = _column(rows, batch, indices, rows.columns[0])
    texts = [_split_chat(tokenizer, chat, rows, index) for chat, index in zip(chats, indices, strict=True)]
    prompts = _plain(tokenizer, [prompt for prompt, _ in texts])
    responses = _plain(tokenizer, [response for _, response in texts])
    return {"prompt": prompts, "response": [_ended(tokenizer, ids) for ids in responses]}


def _split_chat(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], rows: Rows, index: int
) -> tuple[str, str]:
    """The text before the answer of the last assistant message, and that answer with its end-of-turn token."""
    column = rows.columns[0]
    if tokenizer.chat_template is None:
        raise ValueError("`source.messages_column`: the tokenizer has no chat template; take one of a chat model.")
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in chat):
        raise _fault(rows, index, column, "must hold messages with `role` and `content`")
    if not all(turn["content"] is None or isinstance(turn["content"], str) for turn in chat):
        raise _fault(rows, index, column, "must hold messages whose `content` is text, not a list of parts")
    last = max((number for number, turn in enumerate(chat) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise _fault(rows, index, column, "has no assistant message after a first message of another role")
    if not (chat[last]["content"] or "").strip():
        raise _fault(rows, index, column, "has an empty last assistant message")
    try:
        prompt = _chat_text(tokenizer, chat[:last], add_generation_prompt=True)
        whole = _chat_text(tokenizer, chat[: last + 1], add_generation_prompt=False)
    except TemplateError as error:
        raise _fault(rows, index, column, f"does not fit the tokenizer's chat template ({error})") from error
    # Some templates open the answer otherwise than the generation prompt does (a thinking block, for one).
    response = whole.removeprefix(prompt) if whole.startswith(prompt) else chat[last]["content"]
    return prompt, response.rstrip()


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    messages = [dict(turn) for turn in chat]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert isinstance(text, str)
    return text


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Close a response with the end-of-sequence token, unless a special token closes it already."""
    if tokenizer.eos_token_id is None or (ids and ids[-1] in tokenizer.all_special_ids):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _windows(
    rows: Rows, documents: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, lengths: Lengths, seed: int
) -> TokenExamples:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.asarray(piece, dtype=np.int32) for document in documents if len(document) for piece in (document, end)]
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    leading = np.asarray(leading_ids(tokenizer), dtype=np.int32)
    fresh = lengths.max_length - len(leading)
    count = len(stream) // fresh if fresh > 0 else 0
    if count == 0:
        raise ValueError(
            f"`source.path`: {rows.origins[0][0]} has {len(stream)} tokens, less than one window of "
            f"`lengths.max_length`={lengths.max_length}; shorten it or give more text."
        )
    body = stream[: count * fresh].reshape(count, fresh)
    ids = np.concatenate([np.broadcast_to(leading, (count, len(leading))), body], axis=1)
    starts = np.arange(count, dtype=np.int64) * lengths.max_length
    prompts = [
        np.random.default_rng((seed, index)).integers(lengths.min_prompt, lengths.max_prompt, endpoint=True)
        for index in range(count)
    ]
    return TokenExamples(ids.reshape(-1), np.stack([starts, starts + prompts, starts + lengths.max_length], axis=1))


def _truncated(
    rows: Rows, tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, lengths: Lengths
) -> Iterable[tuple[list[int], list[int]]]:
    leading = leading_ids(tokenizer)
    for index, row in enumerate(tokenized):
        prompt, response = row["prompt"], row["response"]
        if len(prompt) > lengths.max_prompt:
            head = leading if prompt[: len(leading)] == leading else []
            prompt = head + prompt[len(prompt) - lengths.max_prompt + len(head) :]
        response = response[: lengths.max_length - len(prompt)]
        if not prompt or not response:
            raise ValueError(
                f"{rows.where(index)}: the {'response' if prompt else 'prompt'} has no tokens; drop the row."
            )
        yield prompt, response
