"""Student and teacher compared token by token, a chunk of tokens at a time.

Shapes: B batch, R response tokens, N response tokens without padding, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
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
class Distributions:
    """A teacher's distributions over some response tokens, kept so that students can be compared with them fast."""

    probabilities: Tensor
    """fp32 [N, V]."""
    negative_entropy: Tensor
    """Sum of p log p of each token, nats, fp32 [N]."""

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head, hidden: Tensor, chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0) -> Distributions:
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


def final_hidden(
    model: StagedCausalLM, batch: Batch, plan: StagePlan | None = None, policy: KVRetentionPolicy | None = None
) -> Tensor:
    """Teacher-forced final hidden states of the real response tokens, [N, H]."""
    out = model(*batch.request, plan=plan, policy=policy)
    hidden: Tensor = out.hidden[batch.response_mask]
    return hidden
