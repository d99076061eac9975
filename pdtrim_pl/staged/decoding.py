"""Token by token: the decode node's loop, and when it stops.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdtrim_pl.staged.cache import KVCache

if TYPE_CHECKING:
    from pdtrim_pl.staged.model import StagedCausalLM

PickToken = Callable[[Tensor], Tensor]
"""From logits [B, V] to token ids [B]."""


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, [B, V] -> [B]."""
    return logits.argmax(dim=-1)


def decode_stream(
    staged: StagedCausalLM, cache: KVCache, *, first: Tensor | None, last_prompt: Tensor, max_new_tokens: int,
    pick: PickToken = greedy,
) -> Iterator[Tensor]:  # fmt: skip
    """The decode node's loop: yields ids [B] until `max_new_tokens` are out.

    Args:
        staged: the decode stage.
        cache: what prefill sent.
        first: the response's first token where prefill predicted it (`boundary: prefill`), [B]; else None.
        last_prompt: the prompt's last token, decode's first input under `boundary: decode`, [B].
        max_new_tokens: number of tokens to yield.
        pick: from logits to a token.
    """
    token, produced = last_prompt, 0
    if first is not None and max_new_tokens > 0:
        token, produced = first, 1
        yield token
    while produced < max_new_tokens:
        with torch.no_grad():
            out = staged.decode(token[:, None], cache)
            cache, token = out.cache, pick(staged.logits(out.hidden[:, -1]))
        produced += 1
        yield token


def until_stopped(stream: Iterator[Tensor], stop_ids: Collection[int]) -> Iterator[Tensor]:
    """Tokens [B] of a stream until every row has produced one of `stop_ids`; a row that has repeats it."""
    last: Tensor | None = None
    for token in stream:
        stops = torch.tensor(sorted(stop_ids), device=token.device, dtype=token.dtype)
        last = token if last is None else torch.where(torch.isin(last, stops), last, token)
        yield last
        if bool(torch.isin(last, stops).all()):
            return


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """The end-of-sequence tokens that a model's generation config or its tokenizer knows."""
    config = model.generation_config
    return joined_stop_ids(config and config.eos_token_id, tokenizer and tokenizer.eos_token_id)


def joined_stop_ids(*told: object) -> tuple[int, ...]:
    """One rising tuple of token ids out of several `eos_token_id`, each a number, a list, or None."""
    ids = {token for entry in told for token in (entry if isinstance(entry, list | tuple) else [entry])}
    return tuple(sorted(token for token in ids if isinstance(token, int)))
