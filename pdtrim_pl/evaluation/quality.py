"""How close a student's response is to its teacher's: per-token comparison in chunks, and means over a data set.

Shapes: B batch, R response tokens, N response tokens without padding, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.losses import Head, chunks
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.staged import StagedCausalLM

CHUNK_TOKENS = 128
"""Tokens whose logits are alive at a time, where nobody says how many."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of single response tokens, fp32, [N] each."""

    nll: Tensor
    """Negative log-likelihood of the token under the student, nats."""
    teacher_nll: Tensor
    kl: Tensor
    """KL(teacher || student), nats."""
    agreement: Tensor
    """1 where both have the same most likely token."""


@dataclass(frozen=True)
class Quality:
    """Means over the response tokens of a data set."""

    nll: float
    teacher_nll: float
    kl: float
    agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Response perplexity of the student."""
        return exp(self.nll)


@torch.no_grad()
def score_tokens(
    student: Tensor, teacher: Tensor, targets: Tensor, student_head: Head, teacher_head: Head,
    chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0,
) -> TokenScores:  # fmt: skip
    """Compare final hidden states of student and teacher, [N, H] each, token by token.

    Args:
        student: final hidden states that predict `targets`.
        teacher: the teacher's.
        targets: response token ids, [N].
        student_head: from hidden states to logits.
        teacher_head: from hidden states to logits.
        chunk_tokens: tokens whose logits are alive at a time.
        min_chunks: call the heads at least so often, for heads that all ranks must gather together.
    """
    parts: list[tuple[Tensor, ...]] = []
    for part in chunks(len(targets), chunk_tokens, min_chunks):
        ours = F.log_softmax(student_head(student[part]).float(), dim=-1)
        theirs = F.log_softmax(teacher_head(teacher[part]).float(), dim=-1)
        nlls = (-x.gather(1, targets[part, None])[:, 0] for x in (ours, theirs))
        kl = (theirs.exp() * (theirs - ours)).sum(dim=-1)
        parts.append((*nlls, kl, (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float()))
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Reference:
    """A teacher's distributions over some response tokens, kept so that students can be compared with them fast."""

    probabilities: Tensor
    """fp32 [N, V]."""
    negative_entropy: Tensor
    """Sum of p log p of each token, nats, fp32 [N]."""

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head, hidden: Tensor, chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0) -> Reference:
        """From the teacher's final hidden states, [N, H]; chunks as in `score_tokens`."""
        parts = []
        for part in chunks(len(hidden), chunk_tokens, min_chunks):
            logs = F.log_softmax(head(hidden[part]).float(), dim=-1)
            probabilities = logs.exp()
            parts.append((probabilities, (probabilities * logs).sum(dim=-1)))
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    @torch.no_grad()
    def compare(
        self, head: Head, hidden: Tensor, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0
    ) -> tuple[float, float]:
        """KL(teacher || student) and NLL of a student, summed over the tokens in fp64, nats.

        The same as the sums of `score_tokens`, in half the passes over the vocabulary.

        Args:
            head: the student's, from hidden states to logits.
            hidden: the student's final hidden states, [N, H].
            targets: response token ids, [N].
            chunk_tokens: tokens whose logits are alive at a time.
            min_chunks: call the head at least so often, for one that all ranks must gather together.
        """
        kl = nll = 0.0
        for part in chunks(len(targets), chunk_tokens, min_chunks):
            ours = F.log_softmax(head(hidden[part]).float(), dim=-1)
            cross = torch.linalg.vecdot(self.probabilities[part], ours)
            kl += float((self.negative_entropy[part] - cross).double().sum())
            nll -= float(ours.gather(1, targets[part, None]).double().sum())
        return kl, nll


@torch.no_grad()
def measure_quality(
    model: StagedCausalLM, teacher: StagedCausalLM, batches: Iterable[Batch], *, plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None, device: torch.device | str = "cpu",
    references: Sequence[Tensor] | None = None,
) -> Quality:  # fmt: skip
    """Teacher-forced quality of `model` under a plan and policy, against `teacher` under its own.

    Args:
        model: the model to judge.
        teacher: the reference.
        batches: requests with known responses.
        plan: plan to run `model` under; its own plan and policy by default.
        policy: with `plan`, the policy.
        device: where both models are.
        references: the teacher's `final_hidden` of every batch, where it is known.

    Raises:
        UserError: no response token at all.
    """
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for index, raw in enumerate(batches):
        batch = raw.on(device)
        ours = final_hidden(model, batch, plan, policy)
        theirs = final_hidden(teacher, batch) if references is None else references[index]
        targets = batch.response_ids[batch.response_mask]
        scores = score_tokens(ours, theirs, targets, model.logits, teacher.logits)
        columns = (scores.nll, scores.teacher_nll, scores.kl, scores.agreement)
        sums += torch.stack([column.double().sum() for column in columns]).cpu()
        tokens += len(targets)
    if not tokens:
        raise UserError("There is no response token to judge: the data part is empty (see `parts` of the data).")
    nll, teacher_nll, kl, agreement = (sums / tokens).tolist()
    return Quality(nll, teacher_nll, kl, agreement, tokens)


def final_hidden(
    model: StagedCausalLM, batch: Batch, plan: StagePlan | None = None, policy: KVRetentionPolicy | None = None
) -> Tensor:
    """Teacher-forced final hidden states of the real response tokens, [N, H]."""
    out = model(*batch.request, plan=plan, policy=policy)
    hidden: Tensor = out.hidden[batch.response_mask]
    return hidden
