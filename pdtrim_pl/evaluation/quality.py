"""How close a student's responses are to its teacher's: means over a data set."""

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
    teacher_nll: float
    kl: float
    agreement: float
    tokens: int

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
        reference: the teacher on that part.
        model: the model to judge.
        plan: plan to run `model` under; its own plan and policy by default.
        policy: with `plan`, the policy.

    Raises:
        UserError: no response token at all.
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
    """`quality_against` a teacher that reads the batches for this one measurement; keeps nothing of it.

    Args:
        model: the model to judge.
        teacher: the reference, under its own plan and policy.
        batches: requests with known responses.
        plan: see `quality_against`.
        policy: see `quality_against`.
        device: where both models are.

    Raises:
        UserError: no response token at all.
    """
    reference = TeacherReference(teacher, list(batches), device=device, states=0)
    return quality_against(reference, model, plan=plan, policy=policy)
