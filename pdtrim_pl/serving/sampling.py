"""How the next token is chosen: greedily, or sampled with a temperature.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from pdtrim_pl.staged.decoding import PickToken

_LEAST = torch.finfo(torch.float32).tiny
"""Temperatures below this one act like it, which is greedy."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Raises:
        UserError: a setting out of range.
    """

    temperature: float = 0.0
    """0 takes the most likely token; higher values sample more freely."""
    top_k: int | None = None
    """Sample among this many most likely tokens; None for all."""
    seed: int = 0
    """Equal seeds give equal tokens, on every device."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability; 1 for all."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"`temperature` is {self.temperature}: give 0 for greedy or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"`top_k` is {self.top_k}: give at least 1, or leave it out.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"`top_p` is {self.top_p}: give a number above 0 and at most 1.")
        if self.seed < 0:
            raise UserError(f"`seed` is {self.seed}: give an integer of at least 0.")

    def picker(self, start: int = 0) -> PickToken:
        """A function from logits [B, V] to token ids [B]. Call it once per response token.

        Args:
            start: index of the response token that the first call chooses. Every index has its own generator, so a
                decode worker that starts at token 1 continues what the prefill worker began with token 0.
        """
        if self.temperature == 0.0:
            from pdtrim_pl.staged.decoding import greedy  # with models, which the parent of the workers does not need

            return greedy
        steps = count(start)
        return lambda logits: self._draw(logits, next(steps))

    def _draw(self, logits: Tensor, step: int) -> Tensor:
        # The noise is drawn on the CPU: generators of different devices give different numbers.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
        # Relative to the largest logit: else a tiny temperature turns several logits into infinities.
        scores = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / max(self.temperature, _LEAST)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < lowest, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # the token that reaches `top_p` stays
            out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scores = scores.masked_fill(out, float("-inf"))
        return (scores + noise.to(logits.device)).argmax(dim=-1)  # Gumbel-max: a draw from softmax(scores)
