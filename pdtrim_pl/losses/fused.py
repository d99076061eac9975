"""Losses on tokens whose value and gradient are made together, chunk by chunk: no logits are computed twice.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pdtrim_pl.losses.base import Distilled, TokenLoss

CPU_ROWS = 16
"""Rows of logits that a CPU turns into losses and gradients at once."""


def fused(terms: Sequence[TokenLoss], batch: Distilled, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The weighted sum of some losses, and the value of each without gradients.

    The gradients with respect to the student's hidden states and head are ready when this returns. Backward only scales
    them. The weights of the student's head must be whole.

    Args:
        terms: the losses.
        batch: results of student and teacher on one batch.
        chunk_tokens: number of tokens whose logits are in memory at once.
    """
    total, each = _Fused.apply(terms, batch, chunk_tokens, batch.student, *batch.student_head_weights)
    return total, each


def weighted_sum(terms: Sequence[TokenLoss], values: Tensor) -> Tensor:
    """The sum of the values of losses, each times its weight, a scalar. Copies no numbers to the device."""
    return torch.stack([term.weight * value for term, value in zip(terms, values.unbind(), strict=True)]).sum()


class _Fused(torch.autograd.Function):
    """The weighted sum of the losses as one operation on the student's hidden states and the weights of its head."""

    @staticmethod
    def forward(
        ctx: Any, terms: Sequence[TokenLoss], batch: Distilled, chunk_tokens: int, hidden: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = [index for index, weight in enumerate(weights) if ctx.needs_input_grad[4 + index]]
        trained = [weights[index] for index in wanted]
        gradients: list[Tensor | None] = [None] * len(trained)
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[3] else None
        each = hidden.new_zeros(len(terms), dtype=torch.float32)
        with _own_casts():
            # Also if there is no token: ranks that share a head must all give its weights a gradient.
            for first in range(0, max(len(hidden), 1), chunk_tokens):
                part = slice(first, first + chunk_tokens)
                targets, scale = batch.targets[part], batch.weights[part]
                with torch.enable_grad():
                    states = hidden[part].detach().requires_grad_()
                    logits = batch.student_head(states)
                teacher = batch.teacher_head(batch.teacher[part])
                of_logits = _of_logits(terms, logits.detach(), teacher, targets, scale, each)
                if of_hidden is None and not trained:
                    continue
                found = torch.autograd.grad(logits, [states, *trained], of_logits, allow_unused=True)
                if of_hidden is not None and found[0] is not None:
                    of_hidden[part] = found[0]
                for index, more in enumerate(found[1:]):
                    if more is not None:
                        total = gradients[index]
                        gradients[index] = more if total is None else total.add_(more)
        ctx.wanted, ctx.weights = wanted, len(weights)
        ctx.save_for_backward(of_hidden, *gradients)
        ctx.mark_non_differentiable(each)
        return weighted_sum(terms, each), each

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Any, ...]:
        of_hidden, *gradients = ctx.saved_tensors
        for gradient in (of_hidden, *gradients):
            if gradient is not None:
                gradient.mul_(above[0])  # a second backward finds them changed, and autograd refuses it
        of_weights: list[Tensor | None] = [None] * ctx.weights
        for index, gradient in zip(ctx.wanted, gradients, strict=True):
            of_weights[index] = gradient
        return None, None, None, of_hidden, *of_weights


def _of_logits(
    terms: Sequence[TokenLoss], student: Tensor, teacher: Tensor, targets: Tensor, scale: Tensor, each: Tensor
) -> Tensor:
    """The gradient of the weighted sum with respect to the student's logits of a chunk, [n, V], in their element type.

    Args:
        terms: the losses. Their values are added to `each`.
        student: logits of the student, [n, V].
        teacher: logits of the teacher, [n, V].
        targets: token ids, [n].
        scale: weight of each token in the mean, [n].
        each: value of every loss so far.
    """
    out = torch.empty_like(student)
    # On a CPU, few rows at a time: their fp32 values stay in the processor's cache.
    rows = CPU_ROWS if student.device.type == "cpu" else len(student)
    for first in range(0, len(student), max(rows, 1)):
        part = slice(first, first + rows)
        ours, theirs = student[part].float(), teacher[part].float()
        total: Tensor | None = None
        for index, term in enumerate(terms):
            losses, gradient = term.with_gradient(ours, theirs, targets[part])
            each[index] += (losses * scale[part]).sum()
            gradient.mul_((term.weight * scale[part])[:, None])
            total = gradient if total is None else total.add_(gradient)
        assert total is not None
        out[part] = total
    return out


@contextmanager
def _own_casts() -> Iterator[None]:
    """Under autocast, cast the weights once for all chunks, and with gradients: an earlier cast may have none."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
