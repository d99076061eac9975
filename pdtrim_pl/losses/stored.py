"""Losses on the teacher's stored rows. Each has the name and the weight of the loss that it stands for.

In place of the teacher's logits they get packed rows, [n, 2 K + 1] (`Rows.packed`).

Shapes: n tokens of one chunk, K kept tokens of each distribution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.base import Distilled, LossTerm, TokenLoss
from pdtrim_pl.losses.chunked import spoken_tokens, token_weights
from pdtrim_pl.losses.heads import gathered_once
from pdtrim_pl.losses.rows import Kind, Rows
from pdtrim_pl.losses.tokens import KL, Tempered
from pdtrim_pl.staged import KVCache, StagedCausalLM
from pdtrim_pl.staged.observed import run_observed
from pdtrim_pl.staged.rows import RowCounts

_NONE = -1e30
"""Logit of a token that does not count. It is finite, so that zero times it is zero."""


class TopKDivergence(TokenLoss):
    """A divergence between two coarse distributions: K kept tokens, and all others as one.

    With K = V it is the divergence itself; with fewer it is at most that, and zero for equal models.

    Args:
        term: the divergence between whole distributions.
    """

    def __init__(self, term: Tempered) -> None:
        super().__init__(term.weight)
        self.name, self.term = term.name, term

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        rows, student = Rows.unpacked(teacher), student / self.term.temperature
        others = student.scatter(-1, rows.ids, _NONE).logsumexp(dim=-1, keepdim=True)
        kept = torch.cat([student.gather(-1, rows.ids), others], dim=-1) - student.logsumexp(dim=-1, keepdim=True)
        theirs = torch.cat([rows.values, rows.extra[:, None].clamp(min=_NONE)], dim=-1)
        return self.term.divergence(kept, theirs) * self.term.temperature**2


class TopKKL(TopKDivergence):
    """The forward divergence, with value and gradient from one softmax of the student.

    The gradient is q - p at kept tokens. At all others it is q times 1 - (their mass in p) / (their mass in q).
    """

    def with_gradient(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, heat = Rows.unpacked(teacher), self.term.temperature
        gradient, kept, ours = _softmax(student, rows.ids, heat)
        gradient.scatter_(-1, rows.ids, 0.0)
        others, wanted, mass = gradient.sum(dim=-1), rows.values.exp(), rows.extra.exp()
        rest = torch.where(mass > 0, mass * (rows.extra - others.log()), 0.0)
        losses = (wanted * (rows.values - ours)).sum(dim=-1) + rest
        gradient.mul_((1 - torch.where(mass > 0, mass / others, 0.0))[:, None])
        gradient.scatter_(-1, rows.ids, kept - wanted)
        return losses * heat**2, gradient.mul_(heat)


class SampledKL(TokenLoss):
    """An unbiased estimate of the forward divergence, in value and gradient. One estimate may be below zero.

    Args:
        term: the divergence between whole distributions.
    """

    def __init__(self, term: KL) -> None:
        super().__init__(term.weight)
        self.name, self.temperature = term.name, term.temperature

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        rows, student = Rows.unpacked(teacher), student / self.temperature
        ours = student.gather(-1, rows.ids) - student.logsumexp(dim=-1, keepdim=True)
        return (rows.extra - (rows.values * ours).sum(dim=-1)) * self.temperature**2

    def with_gradient(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenLoss.with_gradient`."""
        rows, heat = Rows.unpacked(teacher), self.temperature
        gradient, _, ours = _softmax(student, rows.ids, heat)
        gradient.mul_(rows.values.sum(dim=-1, keepdim=True)).scatter_add_(-1, rows.ids, -rows.values)
        losses = rows.extra - (rows.values * ours).sum(dim=-1)
        return losses * heat**2, gradient.mul_(heat)


def stored_terms(terms: Sequence[LossTerm], kind: Kind) -> list[LossTerm]:
    """The losses of a run in the form that reads stored rows.

    Args:
        terms: the losses on the teacher's whole distributions.
        kind: what the rows keep.

    Raises:
        UserError: a loss needs more of the teacher than the rows keep. The message names all of these.
    """
    found, faults = [], []
    for term in terms:
        if not term.reads_teacher:
            found.append(term)
        elif isinstance(term, KL):
            found.append(TopKKL(term) if kind == "top_k" else SampledKL(term))
        elif isinstance(term, Tempered) and kind == "top_k":
            found.append(TopKDivergence(term))
        elif isinstance(term, Tempered):
            faults.append(f"{term.name} is no mean over the teacher's tokens: a sample serves kl alone, `top_k` both")
        else:
            faults.append(f"{term.name} reads the teacher's hidden states, caches or whole logits")
    if faults:
        raise UserError(
            f"`teacher.placement: offline` keeps a few tokens of every distribution, and `losses` wants more: "
            f"{'; '.join(faults)}. Leave these losses out, write the cache with `--kind top_k` where that serves, or "
            "use `teacher.placement: copy`."
        )
    return found


def temperature_of(terms: Sequence[LossTerm]) -> float:
    """The temperature at which the teacher's distributions are stored for these losses.

    Raises:
        UserError: the losses have different temperatures.
    """
    found = {term.temperature for term in terms if isinstance(term, Tempered)}
    if len(found) > 1:
        raise UserError(
            f"The losses have different temperatures ({sorted(found)}), and `teacher.placement: offline` stores the "
            "teacher's distributions at one. Give them the same `temperature`, or use `teacher.placement: copy`."
        )
    return found.pop() if found else 1.0


def run_alone(
    student: StagedCausalLM, batch: Batch, rows: Tensor, min_chunks: int = 0, counts: RowCounts | None = None,
    gather_heads: bool = False,
) -> Distilled:  # fmt: skip
    """Run the student on a batch whose teacher is stored, and collect the input of the losses.

    Args:
        student: it runs under its own plan and policy.
        batch: requests with known responses.
        rows: packed rows of the real response tokens, [N, 2 K + 1].
        min_chunks: see `Distilled`.
        counts: numbers of real tokens of the batch, if the host knows them.
        gather_heads: whether the head is sharded and is to be gathered once for all chunks.
    """
    out, mask = run_observed(student, batch, None, keep_cache=False, counts=counts), batch.response_mask
    spoken = spoken_tokens(mask, counts)
    unused = KVCache({}, out.cache.lengths)
    return Distilled(
        student=out.hidden.flatten(0, 1)[spoken], teacher=rows, targets=batch.response_ids.flatten()[spoken],
        weights=token_weights(mask, spoken, batch.response_weights), student_head=student.compared_logits,
        teacher_head=_as_stored, student_head_weights=student.head_weights,
        student_cache=unused, teacher_cache=unused, student_blocks={}, teacher_blocks={}, token_masks={},
        min_chunks=min_chunks, at_heads=gathered_once(student, None) if gather_heads else None,
    )  # fmt: skip


def _as_stored(rows: Tensor) -> Tensor:
    """The head of a stored teacher: its rows are what the losses read."""
    return rows


def _softmax(student: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The student's probabilities [n, V], those of the kept tokens and their logarithms, [n, K] each."""
    logs = student / temperature if temperature != 1 else student
    logs = logs - logs.logsumexp(dim=-1, keepdim=True)
    ours = logs.gather(-1, ids)
    return logs.exp_(), ours.exp(), ours
