"""Quality of a student compared with its teacher: means over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.teacher import TeacherReference
from pdtrim_pl.evaluation.tokens import final_hidden
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.staged import StagedCausalLM


@dataclass(frozen=True)
class Quality:
    """Means over the response tokens of a data set."""

    nll: float
    """Negative log-likelihood under the student, nats."""
    teacher_nll: float
    """Negative log-likelihood under the teacher, nats."""
    kl: float
    """KL(teacher || student), nats."""
    agreement: float
    """Share of tokens at which both models have the same most likely token."""
    tokens: int
    """Number of response tokens."""

    @property
    def perplexity(self) -> float:
        """Response perplexity of the student."""
        return exp(self.nll)


@torch.no_grad()
def quality_against(
    reference: TeacherReference, model: StagedCausalLM, *, plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None,
) -> Quality:  # fmt: skip
    """Teacher-forced quality of `model` on the data part of a reference.

    Args:
        reference: the teacher's results on this data part.
        model: the model to evaluate.
        plan: plan to run `model` under; its own plan and policy by default.
        policy: the policy to run under, if `plan` is given; None sends everything.

    Raises:
        UserError: the data part has no response token.
    """
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for index, batch in enumerate(reference.batches):
        scores = reference.scores(index, final_hidden(model, batch, plan, policy), model.compared_logits)
        columns = (scores.nll, scores.teacher_nll, scores.kl, scores.agreement)
        sums += torch.stack([column.double().sum() for column in columns]).cpu()
        tokens += len(scores.nll)
    if not tokens:
        raise UserError("There is no response token to judge: the data part is empty (see `parts` of the data).")
    nll, teacher_nll, kl, agreement = (sums / tokens).tolist()
    return Quality(nll, teacher_nll, kl, agreement, tokens)


def measure_quality(
    model: StagedCausalLM, teacher: StagedCausalLM, batches: Iterable[Batch], *, plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None, device: torch.device | str = "cpu",
) -> Quality:  # fmt: skip
    """Teacher-forced quality of `model`, for a single measurement. The teacher's results are not kept.

    Args:
        model: the model to evaluate.
        teacher: the reference, under its own plan and policy.
        batches: requests with known responses.
        plan: see `quality_against`.
        policy: see `quality_against`.
        device: device of both models.

    Raises:
        UserError: the batches have no response token.
    """
    reference = TeacherReference(teacher, list(batches), device=device, states=0)
    return quality_against(reference, model, plan=plan, policy=policy)
