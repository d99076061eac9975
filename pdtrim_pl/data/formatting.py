"""Turn the rows of a source into prompts and responses of token ids."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.compat import dataset_fingerprint
from pdtrim_pl.data.chats import assistant_turns, split_chat, system_text
from pdtrim_pl.data.examples import TokenExamples
from pdtrim_pl.data.malformed import Kind, check_value, named_rows, skipped_rows
from pdtrim_pl.data.prompts import leading_ids, plain_ids, split_ids
from pdtrim_pl.data.rows import Rows
from pdtrim_pl.data.settings import Lengths
from pdtrim_pl.data.tables import FAULT, bad_rows
from pdtrim_pl.errors import UserError

Tokenized = Mapping[str, Sequence[Any]]
T = TypeVar("T")

_FORMAT = 3
"""Part of the cache key. Raise it when rows are tokenised in another way, so that old caches are not used."""
_IDS = [Value("int32")]
_ROW = "row"
"""Column of the number of a row in its source: a chat can become several rows."""
_REQUEST = {"prompt": _IDS, "response": _IDS, "head": Value("int32"), "weight": Value("float64")}
"""Columns of a tokenised prompt and response. `head` is the number of tokens at the start of the prompt that stay if it
is too long; `weight` is what the response counts in training."""


def encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, lengths: Lengths, seed: int, workers: int = 1
) -> TokenExamples:
    """Tokenise a source and make its examples.

    Raw text: all documents are joined, with the end-of-sequence token after each, and cut into windows of
    `lengths.max_length` tokens without overlap. Every window has a random generator of its own, which draws the length
    of its prompt.

    Pairs and chats: prompt and response are tokenised together (`data.prompts.split_ids`), so the prompt has the same
    tokens as in serving. A prompt that is too long keeps its end, and before it the system messages of a chat; a
    response that is too long keeps its start. A response of weight 0 is left out.

    Args:
        rows: the source. `rows.on_bad_row` says whether bad rows are refused or left out with a warning.
        tokenizer: the tokenizer. The special tokens that it puts before a text (such as a beginning-of-sequence token)
            start every prompt and every window.
        lengths: lengths in tokens.
        seed: seed of the split points.
        workers: number of processes that tokenise.

    Raises:
        UserError: a row cannot be read, or the text is shorter than one window. The message names the place.
    """
    function, origin = _function(rows.kind, tokenizer), rows.parts[0].origin
    if rows.kind == "text":
        documents = _tokenize(rows, tokenizer, function, {"ids": _IDS}, workers)
        stream = _joined(documents.with_format("numpy")["ids"], tokenizer)
        examples = _windows(stream, tokenizer, lengths, (seed,))
        if len(examples) == 0:
            raise UserError(
                f"`source.path`: {origin} has {len(stream)} tokens, less than one window of "
                f"`lengths.max_length`={lengths.max_length}; shorten it or give more text."
            )
        return examples
    tokenized = _tokenize(rows, tokenizer, function, _REQUEST, workers)
    weights = tokenized.with_format("numpy")["weight"][:]
    if not weights.any():
        raise UserError(f"`source.path`: every response of {origin} has the weight 0; raise some.")
    return TokenExamples.from_pairs(_truncated(tokenized.select(weights.nonzero()[0]), lengths), weights[weights > 0])


def encode_piece(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, lengths: Lengths, seed: Sequence[int]
) -> TokenExamples:
    """Make the examples of a piece of a source, as `encode` does of the whole, without a cache; there may be none.

    Text is joined and cut into windows within the piece; what is left at its end is dropped.

    Args:
        rows: the piece.
        tokenizer: the tokenizer.
        lengths: lengths in tokens.
        seed: seed of the split points; it must differ between pieces.

    Raises:
        UserError: a row cannot be read.
    """
    count = len(rows.dataset)
    found = _function(rows.kind, tokenizer)(rows.dataset[:], range(count), rows, tokenizer) if count else {FAULT: []}
    good = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    faults = [f"{rows.where(row[_ROW])}: {row[FAULT]}" for row in good if row[FAULT] is not None]
    if skipped := [*rows.skipped, *faults]:
        rank_zero_warn(named_rows(skipped, len(good) + len(rows.skipped)))
    good = [row for row in good if row[FAULT] is None]
    if rows.kind == "text":
        return _windows(_joined([row["ids"] for row in good], tokenizer), tokenizer, lengths, seed)
    good = [row for row in good if row["weight"] > 0]
    return TokenExamples.from_pairs(_truncated(good, lengths), np.asarray([row["weight"] for row in good], np.float64))


def _function(kind: Kind, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Tokenized]:
    if kind == "chat" and tokenizer.chat_template is None:
        raise UserError("`source.messages_column`: the tokenizer has no chat template; take one of a chat model.")
    return {"text": _text_ids, "pairs": _pair_ids, "chat": _chat_ids}[kind]


def _tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, function: Callable[..., Tokenized], columns: Mapping[str, Any],
    workers: int,
) -> Dataset:  # fmt: skip
    """Run `function` over all rows with `Dataset.map`, and leave out the bad rows.

    The key of the cache on disk is made here from everything that decides the result. The default key contains the hash
    of the tokenizer object, which changes when the tokenizer is used. The number of workers is no part of it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(vocabulary)
    key = [_FORMAT, dataset_fingerprint(rows.dataset), function.__name__, rows.columns, backend]
    key += [tokenizer.special_tokens_map, tokenizer.chat_template, leading_ids(tokenizer), rows.on_bad_row, rows.turns]
    key += [list(rows.turn_weights)]
    tokenized = rows.dataset.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=list(rows.columns),
        fn_kwargs={"rows": rows, "tokenizer": tokenizer},
        features=Features({**columns, _ROW: Value("int64"), FAULT: Value("string")}),
        new_fingerprint=Hasher.hash(key),
        num_proc=min(workers, len(rows.dataset)) if workers > 1 else None,  # a pool of one process would be slower
        desc="Tokenising",
    )
    bad = bad_rows(tokenized)
    faulty = [tokenized[row] for row in bad.nonzero()[0].tolist()]
    faults = [f"{rows.where(row[_ROW])}: {row[FAULT]}" for row in faulty]
    if skipped := [*rows.skipped, *faults]:
        rank_zero_warn(skipped_rows(skipped, len(tokenized) + len(rows.skipped)))
        tokenized = tokenized.select((~bad).nonzero()[0])
    return tokenized


def _read(
    rows: Rows, batch: Mapping[str, Any], indices: Sequence[int], read: Callable[..., T], instead: T
) -> tuple[list[T], list[str | None]]:
    """Apply `read` to the values of each row.

    Returns:
        One result for each row (`instead` for a bad row), and one fault for each row (None for a good row).
    """
    results: list[T] = []
    faults: list[str | None] = []
    for index, *values in zip(indices, *(batch[column] for column in rows.columns), strict=True):
        try:
            if rows.kind == "chat":
                values = [json.loads(value) for value in values]
            for column, value in zip(rows.columns, values, strict=True):
                check_value(rows.kind, column, value)
            results.append(read(*values))
            faults.append(None)
        except ValueError as error:
            results.append(instead)
            faults.append(rows.refuse(index, error))
    return results, faults


def _text_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    texts, faults = _read(rows, batch, indices, str, "")
    return {"ids": plain_ids(tokenizer, texts), _ROW: indices, FAULT: faults}


def _pair_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    pairs, faults = _read(rows, batch, indices, lambda *pair: pair, ("", ""))
    leading = leading_ids(tokenizer)
    return _split(rows, indices, tokenizer, pairs, faults, [leading] * len(pairs), leading)


def _chat_ids(
    batch: Mapping[str, Any], indices: Sequence[int], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    (column,) = rows.columns
    weights = [1.0] * len(indices)
    if rows.turns == "all":
        turns = [
            (index, *turn) for index, chat in zip(indices, batch[column], strict=True) for turn in _turns(chat, rows)
        ]
        indices, batch = [index for index, *_ in turns], {column: [turn for _, turn, _ in turns]}
        weights = [weight for *_, weight in turns]

    def read(chat: Sequence[Any]) -> tuple[str, str, float | None, str]:
        try:
            return *split_chat(tokenizer, chat), system_text(tokenizer, chat)
        except ValueError as error:
            raise UserError(f"column `{column}` {error}") from error

    unread: tuple[str, str, float | None, str] = ("", "", None, "")
    chats, faults = _read(rows, batch, indices, read, unread)
    leading = leading_ids(tokenizer)
    heads = [ids or leading for ids in plain_ids(tokenizer, [system for *_, system in chats])]
    tokenized = _split(rows, indices, tokenizer, [chat[:2] for chat in chats], faults, heads)
    said = [weight if own is None else own for weight, (_, _, own, _) in zip(weights, chats, strict=True)]
    return {**tokenized, "weight": said}


def _turns(chat: str, rows: Rows) -> list[tuple[str, float]]:
    """A chat as JSON up to each message that the assistant said, with its weight; a bad chat as it is."""
    try:
        turns = [json.dumps(turn) for turn in assistant_turns(json.loads(chat))]
    except ValueError:
        turns = [chat]
    early = [rows.turn_weights[0]] * (len(turns) - len(rows.turn_weights))
    return list(zip(turns, [*early, *rows.turn_weights[-len(turns) :]], strict=True))


def _split(
    rows: Rows, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]],
    faults: list[str | None], heads: Sequence[Sequence[int]], leading: Sequence[int] = (),
) -> Tokenized:  # fmt: skip
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    kept: list[int] = []
    for row, (prompt, response) in enumerate(split_ids(tokenizer, pairs)):
        prompts.append([*leading, *prompt])
        responses.append(_ended(tokenizer, response))
        kept.append(len(heads[row]) if prompts[row][: len(heads[row])] == list(heads[row]) else 0)
        if faults[row] is None and not (prompts[row] and response):
            faults[row] = rows.refuse(indices[row], f"the {'response' if prompts[row] else 'prompt'} has no tokens")
    ones = [1.0] * len(prompts)
    return {"prompt": prompts, "response": responses, "head": kept, "weight": ones, _ROW: indices, FAULT: faults}


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Append the end-of-sequence token to a response, unless it already ends with a special token."""
    closing = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if tokenizer.eos_token_id is None or (ids and ids[-1] in closing):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _joined(documents: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """All documents in a row, with the end-of-sequence token after each."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.asarray(piece, dtype=np.int32) for document in documents if len(document) for piece in (document, end)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


def _windows(
    stream: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, lengths: Lengths, seed: Sequence[int]
) -> TokenExamples:
    leading = np.asarray(leading_ids(tokenizer), dtype=np.int32)
    fresh = lengths.max_length - len(leading)
    count = len(stream) // fresh if fresh > 0 else 0
    body = stream[: count * fresh].reshape(count, fresh)
    ids = np.concatenate([np.broadcast_to(leading, (count, len(leading))), body], axis=1)
    starts = np.arange(count, dtype=np.int64) * lengths.max_length
    prompts = [
        np.random.default_rng((*seed, index)).integers(lengths.min_prompt, lengths.max_prompt, endpoint=True)
        for index in range(count)
    ]
    splits = starts + np.asarray(prompts, dtype=np.int64)
    return TokenExamples(ids.reshape(-1), np.stack([starts, splits, starts + lengths.max_length], axis=1))


def _truncated(tokenized: Iterable[Mapping[str, Any]], lengths: Lengths) -> Iterable[tuple[list[int], list[int]]]:
    for row in tokenized:
        prompt, response = row["prompt"], row["response"]
        if len(prompt) > lengths.max_prompt:
            head = prompt[: row["head"]] if row["head"] < lengths.max_prompt else []
            prompt = head + prompt[len(prompt) - lengths.max_prompt + len(head) :]
        yield prompt, response[: lengths.max_length - len(prompt)]
