"""What is kept of a teacher's distribution to distil without the teacher: a few tokens of it, as one row of numbers.

Shapes: n tokens, K kept tokens of each distribution, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["top_k", "sampled"]
"""`top_k` keeps the most likely tokens and the mass of all others. `sampled` keeps an unbiased sample."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The kept parts of n distributions."""

    ids: Tensor
    """Ids of the kept tokens, int32 [n, K]. A sample may hold one id several times."""
    values: Tensor
    """`top_k`: log-probabilities. `sampled`: weights, whose sum over equal ids has the probability as its mean. [n, K].
    """
    extra: Tensor
    """`top_k`: log of the probability of all other tokens, -inf if there is none. `sampled`: sum of p log p. [n]."""

    @classmethod
    def top_k(cls, logits: Tensor, k: int, temperature: float = 1.0) -> Rows:
        """Keep the k most likely tokens, and the exact mass of all others.

        Args:
            logits: of the teacher, [n, V].
            k: number of tokens to keep; at most V are kept.
            temperature: the logits are divided by it.
        """
        logs = F.log_softmax(logits / temperature, dim=-1)
        values, ids = logs.topk(min(k, logs.shape[-1]), dim=-1)
        return cls(ids.int(), values, logs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1))

    @classmethod
    def sampled(
        cls, logits: Tensor, samples: int, temperature: float = 1.0, exponent: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Rows:  # fmt: skip
        """Draw tokens with replacement from a proposal q ~ p^exponent, each with the weight p / q / samples.

        The weights make the sample unbiased: the mean of the weight of a token is its probability. An exponent below 1
        draws rare tokens more often. Source: random sampling knowledge distillation (arXiv 2503.16870).

        Args:
            logits: of the teacher, [n, V].
            samples: number of draws.
            temperature: the logits are divided by it.
            exponent: exponent of the proposal; 1 draws from the distribution itself.
            generator: makes the draws.
        """
        logs = F.log_softmax(logits / temperature, dim=-1)
        proposal = F.log_softmax(logs * exponent, dim=-1)
        ids = torch.multinomial(proposal.exp(), samples, replacement=True, generator=generator)
        weights = (logs.gather(-1, ids) - proposal.gather(-1, ids)).exp() / samples
        return cls(ids.int(), weights, (logs.exp() * logs).sum(dim=-1))

    @classmethod
    def unpacked(cls, packed: Tensor) -> Rows:
        """The rows in what `packed` returned. Ids become int64, with which tensors are indexed."""
        kept = packed.shape[-1] // 2
        return cls(packed[:, :kept].long(), packed[:, kept:-1], packed[:, -1])

    def packed(self) -> Tensor:
        """The rows as one tensor in the element type of the values, [n, 2 K + 1]. fp32 holds ids below 2^24 exactly."""
        return torch.cat([self.ids.to(self.values.dtype), self.values, self.extra[:, None]], dim=-1)
