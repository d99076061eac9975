"""Compare student and teacher token by token, one chunk of tokens at a time.

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
"""Default for the number of tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of every response token, fp32, [N] each."""

    nll: Tensor
    """Negative log-likelihood of the token under the student, nats."""
    teacher_nll: Tensor
    """Negative log-likelihood of the token under the teacher, nats."""
    kl: Tensor
    """KL(teacher || student), nats."""
    agreement: Tensor
    """1 if both models have the same most likely token, else 0."""


@torch.no_grad()
def score_tokens(
    student: Tensor, teacher: Tensor, targets: Tensor, student_head: Head, teacher_head: Head,
    chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0,
) -> TokenScores:  # fmt: skip
    """Compare final hidden states of student and teacher, [N, H] each, token by token.

    Args:
        student: the student's final hidden states that predict `targets`, [N, H].
        teacher: the teacher's final hidden states, [N, H].
        targets: response token ids, [N].
        student_head: the student's head, from hidden states to logits.
        teacher_head: the teacher's head.
        chunk_tokens: number of tokens whose logits are in memory at once.
        min_chunks: minimum number of calls of the heads. With sharded heads all ranks must make the same number.
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
    """A teacher's distributions over some response tokens, stored for fast comparison with students."""

    probabilities: Tensor
    """fp32 [N, V]."""
    negative_entropy: Tensor
    """Sum of p log p over the vocabulary, nats, fp32 [N]."""

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head, hidden: Tensor, chunk_tokens: int = CHUNK_TOKENS, min_chunks: int = 0) -> Distributions:
        """Compute them from the teacher's final hidden states, [N, H]; other arguments as of `score_tokens`."""
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

        The result is that of summing `score_tokens`, with half the passes over the vocabulary.

        Args:
            head: the student's head, from hidden states to logits.
            hidden: the student's final hidden states, [N, H].
            targets: response token ids, [N].
            chunk_tokens: number of tokens whose logits are in memory at once.
            min_chunks: minimum number of calls of the head. With a sharded head all ranks must make the same number.
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
    """Final hidden states of the teacher-forced pass that predict the real response tokens, [N, H].

    Runs under `plan` and `policy`; under the model's own by default.
    """
    out = model(*batch.request, plan=plan, policy=policy)
    hidden: Tensor = out.hidden[batch.response_mask]
    return hidden
