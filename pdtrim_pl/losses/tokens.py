"""Losses on the logits of each token.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.base import TokenLoss


class Tempered(TokenLoss):
    """A divergence between distributions softened by a temperature, times the temperature squared.

    Source: Hinton et al. (arXiv 1503.02531).
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise UserError(f"`temperature` of the loss {self.name} is {temperature}: give a positive number.")
        self.temperature = temperature

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        if self.temperature == 1:  # saves a pass over [n, V]
            return self.divergence(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1))
        softened = (F.log_softmax(logits / self.temperature, dim=-1) for logits in (student, teacher))
        return self.divergence(*softened) * self.temperature**2

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence [n] from log-probabilities of student and teacher, [n, V] each."""


class KL(Tempered):
    """Forward divergence KL(teacher || student)."""

    name = "kl"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _kl(teacher, student)

    def with_gradient(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenLoss.with_gradient`."""
        if self.temperature != 1:
            student, teacher = student / self.temperature, teacher / self.temperature
        ours, theirs = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        wanted = theirs.exp()
        losses = theirs.sub_(ours).mul_(wanted).sum(-1)
        gradient = ours.exp_().sub_(wanted)
        if self.temperature != 1:
            losses, gradient = losses * self.temperature**2, gradient.mul_(self.temperature)
        return losses, gradient


class ReverseKL(Tempered):
    """Reverse divergence KL(student || teacher), which is mode seeking."""

    name = "reverse_kl"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _kl(student, teacher)


class JSD(Tempered):
    """Jensen-Shannon divergence: the mean of the two divergences from the mixture; at most log 2 nats."""

    name = "jsd"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        mixture = torch.logaddexp(student, teacher) - torch.log(student.new_tensor(2.0))
        return 0.5 * (_kl(teacher, mixture) + _kl(student, mixture))


class CrossEntropy(TokenLoss):
    """Cross-entropy of the response tokens; the teacher is not used."""

    name = "ce"

    @property
    def reads_teacher(self) -> bool:
        return False

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(student, targets, reduction="none")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)
