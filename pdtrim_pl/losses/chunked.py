"""The training loss of a batch: a weighted list of losses. Logits are computed for one chunk of tokens at a time.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
Losses on tokens are averaged over the response tokens of a row, then over rows. So a batch that is split among ranks
gives the same value. Losses on states (`hidden`, `kv`) are means over the batch of each rank, in which all rows count
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.base import Distilled, LossTerm, StateLoss, TokenLoss
from pdtrim_pl.losses.fused import fused, weighted_sum
from pdtrim_pl.staged.rows import RowCounts


def training_loss(
    terms: Sequence[LossTerm], batch: Distilled, *, chunk_tokens: int = 256
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss, and the value of every loss without its weight, by name and without gradients.

    Logits are computed and freed chunk by chunk: at most `chunk_tokens` x V logits of a model are in memory at once.
    Value and gradient of a chunk are made together, so that its logits are computed once. Where weights are sharded, or
    gradients would underflow in fp16, backward computes the logits again instead. Value and gradient equal those of the
    dense computation.

    Args:
        terms: the losses.
        batch: results of student and teacher on one batch.
        chunk_tokens: number of tokens in a chunk.
    """
    state_values = {term.name: term.of(batch) for term in terms if isinstance(term, StateLoss)}
    token_terms = [term for term in terms if isinstance(term, TokenLoss)]
    parts: list[Tensor] = [term.weight * state_values[term.name] for term in terms if term.name in state_values]
    values = {name: value.detach() for name, value in state_values.items()}
    if token_terms:
        together = fused if batch.min_chunks == 0 and not _in_fp16(batch.student) else _recomputed
        if batch.at_heads is None:
            total, each = together(token_terms, batch, chunk_tokens)
        else:
            total, each = batch.at_heads(batch, lambda batch: together(token_terms, batch, chunk_tokens))
        parts.append(total)
        values |= {term.name: value for term, value in zip(token_terms, each, strict=True)}
    return torch.stack(parts).sum(), values


def _recomputed(terms: Sequence[TokenLoss], batch: Distilled, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses on tokens, and the value of each. Backward computes the logits of each chunk again."""
    each = batch.student.new_zeros(len(terms), dtype=torch.float32)
    for part in chunks(len(batch.targets), chunk_tokens, batch.min_chunks):
        args = (batch.student[part], batch.teacher[part], batch.targets[part], batch.weights[part])
        each = each + checkpoint(_chunk, terms, batch, *args, use_reentrant=False)
    return weighted_sum(terms, each), each.detach()


def _in_fp16(hidden: Tensor) -> bool:
    device = hidden.device.type
    used = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return used == torch.float16


def check_terms(terms: Sequence[LossTerm]) -> None:
    """Refuse an empty list of losses, and a list with the same loss twice.

    Raises:
        UserError: the list is empty or has a name twice.
    """
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise UserError(f"`losses` is {names}: give at least one loss, and each at most once.")


def token_weights(
    response_mask: Tensor, spoken: Tensor | None = None, response_weights: Tensor | None = None
) -> Tensor:
    """Weights of real response tokens in a mean over the tokens of a row, then over rows: [B, R] -> [N].

    The mean is divided by the numbers of tokens and rows, whatever they weigh: a batch of one row counts its weight
    too, and a batch that is split among ranks or micro-batches gives the same gradient. The weights of a training part
    have a mean of 1 (`Collator.mean_weight`), so the loss over an epoch is a weighted mean.

    Args:
        response_mask: True on real tokens.
        spoken: result of `spoken_tokens`, if it is there already.
        response_weights: what each token counts, [B, R]; ones by default, and then the result has the sum 1.
    """
    counts = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    rows = (response_mask.sum(dim=1) > 0).sum().clamp(min=1)
    spoken = spoken_tokens(response_mask) if spoken is None else spoken
    said = response_mask if response_weights is None else response_weights
    return (said.float() / counts / rows).flatten()[spoken]


def spoken_tokens(response_mask: Tensor, counts: RowCounts | None = None) -> Tensor:
    """Indices of the real response tokens in the flattened mask: [B, R] -> [N].

    Args:
        response_mask: True on real tokens.
        counts: numbers of real tokens of each row. Without them, the host waits for the device to read the mask.
    """
    if counts is None:
        return response_mask.flatten().nonzero()[:, 0]
    return counts.real_responses(response_mask.shape[1], response_mask.device)


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
