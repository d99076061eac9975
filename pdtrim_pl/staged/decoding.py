"""Decoding token by token: the loop of the decode node and its stop rules.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdtrim_pl.data.prompts import joined_stop_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.staged.cache import KVCache
from pdtrim_pl.staged.model import StagedCausalLM
from pdtrim_pl.staged.preallocated import PreallocatedCache
from pdtrim_pl.staged.request import as_bool

PickToken = Callable[[Tensor], Tensor]
"""Chooses the next tokens: from logits [B, V] to token ids [B]."""


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, [B, V] -> [B]."""
    return logits.argmax(dim=-1)


class DecodeLoop(Iterator[Tensor]):
    """The loop of the decode node: an iterator over token ids, [B] each.

    It ends after `room` tokens, or earlier when every row has produced a stop token. A row that has produced a stop
    token repeats it until the loop ends.

    Args:
        staged: the model that decodes.
        sent: the cache that prefill sent. The loop copies it into a larger cache and keeps no reference to it.
        room: maximum number of tokens.
        first: first token of the response, [B], if prefill predicted it (`boundary: prefill`); else None.
        last_prompt: last token of the prompt, [B]. Under `boundary: decode` it is the first input of decode.
        pick: chooses a token from the logits.
        stop_ids: stop tokens.
        plan: decode under this plan instead of the model's own.
    """

    def __init__(
        self, staged: StagedCausalLM, sent: KVCache, *, room: int, first: Tensor | None, last_prompt: Tensor,
        pick: PickToken = greedy, stop_ids: Collection[int] = (), plan: StagePlan | None = None,
    ) -> None:  # fmt: skip
        self.staged, self.pick, self.plan = staged, pick, plan
        self.left = room
        """Maximum number of tokens that are still to come."""
        self._first, self._fed = first, last_prompt
        self._stops = torch.tensor(sorted(stop_ids), device=last_prompt.device, dtype=last_prompt.dtype)
        self._done = torch.zeros_like(last_prompt, dtype=torch.bool)
        with torch.no_grad():
            self._cache = PreallocatedCache(sent, max(room - (first is not None), 0))

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.left < 1:
            raise StopIteration
        self.left -= 1
        if self._first is not None:
            token, self._first = self._first, None
        else:
            token = self.pick(self.staged.logits(self.staged.step(self._fed, self._cache, plan=self.plan)))
        if len(self._stops):
            token = torch.where(self._done, self._fed, token)
            self._done = torch.isin(token, self._stops)
            if bool(self._done.all()):
                self.left = 0
        self._fed = token
        return token


@torch.no_grad()
def stream(
    staged: StagedCausalLM, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, max_new_tokens: int,
    stop_ids: Collection[int] = (), pick: PickToken = greedy,
) -> DecodeLoop:  # fmt: skip
    """Run prefill under the model's plan and policy, and return the loop that decodes. Greedy by default.

    Args:
        staged: the model that runs both stages.
        prompt_ids: token ids, [B, P], padded on the left.
        prompt_mask: True on real tokens, [B, P]; all real by default.
        max_new_tokens: maximum number of tokens of a response.
        stop_ids: a response ends at one of these tokens.
        pick: chooses a token from the logits.

    Raises:
        UserError: `max_new_tokens` is below 1, or prompt and response exceed the model's context.
    """
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` is {max_new_tokens}: give at least 1.")
    staged.check_length(prompt_ids, prompt_mask, max_new_tokens)
    valid = as_bool(prompt_ids, prompt_mask)
    handled = prompt_ids.shape[1] - (staged.plan.boundary == "decode")
    encoded = staged.prefill(prompt_ids[:, :handled], valid[:, :handled])
    first = pick(staged.logits(encoded.hidden[:, -1])) if staged.plan.boundary == "prefill" else None
    return DecodeLoop(
        staged, encoded.cache.retained(staged.policy), room=max_new_tokens, first=first, last_prompt=prompt_ids[:, -1],
        pick=pick, stop_ids=stop_ids,
    )  # fmt: skip


def generate(
    staged: StagedCausalLM, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, max_new_tokens: int,
    stop_ids: Collection[int] = (), pick: PickToken = greedy,
) -> Tensor:  # fmt: skip
    """Generate a batch of responses, [B, up to max_new_tokens]; arguments and errors as for `stream`.

    A row that has produced one of `stop_ids` repeats it until every row has.
    """
    loop = stream(staged, prompt_ids, prompt_mask, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pick=pick)
    return torch.stack(list(loop), dim=1)


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """The end-of-sequence tokens of a model's generation config and of its tokenizer, ascending."""
    config = model.generation_config
    return joined_stop_ids(config and config.eos_token_id, tokenizer and tokenizer.eos_token_id)
