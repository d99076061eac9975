"""The training loss of a batch: a weighted list of losses. Logits are computed for one chunk of tokens at a time.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
Losses on tokens are averaged over the response tokens of a row, then over rows. So a batch that is split among ranks
gives the same value. Losses on states (`hidden`, `kv`) are means over the batch of each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.base import Distilled, LossTerm, StateLoss, TokenLoss


def distillation_loss(terms: Sequence[LossTerm], batch: Distilled, *, chunk_tokens: int = 128) -> dict[str, Tensor]:
    """The value of every loss, without its weight, by name. Logits are computed and freed chunk by chunk.

    Backward computes the logits of each chunk again, so at most `chunk_tokens` x V logits of a model are in memory at
    once. Value and gradient equal those of the dense computation.

    Args:
        terms: the losses.
        batch: results of student and teacher on one batch.
        chunk_tokens: number of tokens in a chunk.
    """
    token_terms = [term for term in terms if isinstance(term, TokenLoss)]
    values = {term.name: term.of(batch) for term in terms if isinstance(term, StateLoss)}
    if token_terms:
        total = batch.student.new_zeros(len(token_terms), dtype=torch.float32)
        for part in chunks(len(batch.targets), chunk_tokens, batch.min_chunks):
            args = (batch.student[part], batch.teacher[part], batch.targets[part], batch.weights[part])
            total = total + checkpoint(_chunk, token_terms, batch, *args, use_reentrant=False)
        values |= {term.name: value for term, value in zip(token_terms, total, strict=True)}
    return values


def weighted_sum(terms: Sequence[LossTerm], values: Mapping[str, Tensor]) -> Tensor:
    """The training loss: the sum of all values, each times its weight."""
    return torch.stack([term.weight * values[term.name] for term in terms]).sum()


def check_terms(terms: Sequence[LossTerm]) -> None:
    """Refuse an empty list of losses, and a list with the same loss twice.

    Raises:
        UserError: the list is empty or has a name twice.
    """
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise UserError(f"`losses` is {names}: give at least one loss, and each at most once.")


def token_weights(response_mask: Tensor) -> Tensor:
    """Weights of real response tokens in a mean over the tokens of a row, then over rows: [B, R] -> [N]; sum 1."""
    counts = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    rows = (response_mask.sum(dim=1) > 0).sum().clamp(min=1)
    return (response_mask.float() / counts / rows)[response_mask]


def chunks(length: int, size: int, at_least: int = 0) -> list[slice]:
    """Slices that cut `length` tokens into chunks of at most `size`; empty slices fill up to `at_least` chunks."""
    return [slice(i * size, (i + 1) * size) for i in range(max(ceil(length / size), at_least))]


def _chunk(
    terms: Sequence[TokenLoss], batch: Distilled, student: Tensor, teacher: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    student_logits = batch.student_head(student).float()
    with torch.no_grad():
        teacher_logits = batch.teacher_head(teacher).float()
    return torch.stack([(t.per_token(student_logits, teacher_logits, targets) * weights).sum() for t in terms])
