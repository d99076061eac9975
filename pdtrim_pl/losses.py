"""Distillation losses: a weighted list of small classes, chunked over tokens so that no full logits are ever held.

Shapes: N response tokens of a batch (padding left out), n tokens of one chunk, H hidden, V vocabulary.
Losses on tokens are means over a row's response tokens, then over rows, so a batch split over ranks gives the same
value. Losses on states (`hidden`, `kv`) are means over the batch of each rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged import KVCache

Head = Callable[[Tensor], Tensor]
"""From final hidden states [n, H] to logits [n, V]."""


@dataclass(frozen=True)
class Distilled:
    """Student and teacher on one batch: all that a loss may look at."""

    student: Tensor
    """Final hidden states of the student that predict the response tokens, [N, H]."""
    teacher: Tensor
    targets: Tensor
    """Response token ids, [N]."""
    weights: Tensor
    """Each token's share of the batch's mean, [N]; they sum to 1."""
    student_head: Head
    teacher_head: Head
    student_cache: KVCache
    """The prompt's cache as the student sent it."""
    teacher_cache: KVCache
    """The teacher's cache at the same entries."""
    student_blocks: Mapping[Stage, Mapping[int, Tensor]]
    """Outputs of the student's blocks that a loss asked to see, [B, T, H] each."""
    teacher_blocks: Mapping[Stage, Mapping[int, Tensor]]
    token_masks: Mapping[Stage, Tensor]
    """Real tokens of each stage, [B, T]."""
    min_chunks: int = 0
    """Call the heads at least so often: sharded heads are gathered by all ranks together."""


class LossTerm(ABC):
    """One weighted part of the training loss.

    Args:
        weight: its factor in the sum.

    Raises:
        ValueError: the weight is not positive.
    """

    name: ClassVar[str]
    """Under this name it is logged, as `train/<name>`."""

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0:
            raise ValueError(f"`weight` of the loss {self.name} is {weight}: give a positive number or drop the loss.")
        self.weight = weight

    @property
    def watches_blocks(self) -> bool:
        """Whether the outputs of single blocks must be recorded for this loss."""
        return False


class TokenLoss(LossTerm):
    """A loss on the logits of single tokens. A subclass writes `per_token`."""

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Losses [n] from logits in fp32, [n, V] each, and token ids [n]."""


class StateLoss(LossTerm):
    """A loss on hidden states or caches. A subclass writes `of`."""

    @abstractmethod
    def of(self, batch: Distilled) -> Tensor:
        """The loss of the whole batch, a scalar."""


class _Tempered(TokenLoss):
    """A divergence between softened distributions, scaled by temperature squared (Hinton et al., arXiv 1503.02531)."""

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"`temperature` of the loss {self.name} is {temperature}: give a positive number.")
        self.temperature = temperature

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        if self.temperature == 1:  # every pass over [n, V] costs time
            return self.divergence(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1))
        softened = (F.log_softmax(logits / self.temperature, dim=-1) for logits in (student, teacher))
        return self.divergence(*softened) * self.temperature**2

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """From log-probabilities [n, V] each to [n]."""


class KL(_Tempered):
    """Forward divergence KL(teacher || student)."""

    name = "kl"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _kl(teacher, student)


class ReverseKL(_Tempered):
    """Reverse divergence KL(student || teacher), mode seeking."""

    name = "reverse_kl"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _kl(student, teacher)


class JSD(_Tempered):
    """Jensen-Shannon divergence: the mean of both divergences from the mixture, at most log 2."""

    name = "jsd"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        mixture = torch.logaddexp(student, teacher) - torch.log(student.new_tensor(2.0))
        return 0.5 * (_kl(teacher, mixture) + _kl(student, mixture))


class CrossEntropy(TokenLoss):
    """Cross-entropy of the response tokens themselves."""

    name = "ce"

    def per_token(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(student, targets, reduction="none")


class HiddenMatch(StateLoss):
    """Distance between student and teacher outputs of the same original block, over both stages' tokens.

    Args:
        weight: factor in the sum.
        metric: `mse`, relative to the teacher's mean square, or `cosine` (1 - cosine).
        blocks: original indices to compare; every block that the student runs by default.
    """

    name = "hidden"

    def __init__(
        self, weight: float = 1.0, metric: Literal["mse", "cosine"] = "mse", blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__(weight)
        self.metric = metric
        self.blocks = None if blocks is None else frozenset(blocks)

    @property
    def watches_blocks(self) -> bool:
        return True

    def of(self, batch: Distilled) -> Tensor:
        terms = []
        seen = {block for stage in STAGES for block in batch.student_blocks[stage]}
        if self.blocks is not None and not self.blocks & seen:
            raise ValueError(
                f"`blocks` of the loss hidden is {sorted(self.blocks)}, and no stage runs any of them. Blocks that are "
                f"run: {sorted(seen)}."
            )
        for stage in STAGES:
            mask = batch.token_masks[stage]
            for block, out in batch.student_blocks[stage].items():
                if mask.any() and (self.blocks is None or block in self.blocks):
                    terms.append(self._distance(out[mask].float(), batch.teacher_blocks[stage][block][mask].float()))
        return torch.stack(terms).mean() if terms else batch.student.sum() * 0.0

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.metric == "cosine":
            return 1.0 - F.cosine_similarity(student, teacher, dim=-1).mean()
        return _relative_mse(student, teacher)


class KVMatch(StateLoss):
    """Distance between the student's and the teacher's prompt KV, as sent, for every block of D.

    The mean over blocks of the squared difference relative to the teacher's mean square, keys and values alike.
    """

    name = "kv"

    def of(self, batch: Distilled) -> Tensor:
        terms = []
        for index, sent in batch.student_cache.blocks.items():
            full, mask = batch.teacher_cache.blocks[index], sent.slots.valid
            if not mask.any():
                continue
            for ours, theirs in ((sent.keys, full.keys), (sent.values, full.values)):
                terms.append(_relative_mse(ours.transpose(1, 2)[mask].float(), theirs.transpose(1, 2)[mask].float()))
        return torch.stack(terms).mean() if terms else batch.student.sum() * 0.0


def distillation_loss(terms: Sequence[LossTerm], batch: Distilled, *, chunk_tokens: int = 128) -> dict[str, Tensor]:
    """The value of every term, unweighted, by its name. Logits are made, used and freed chunk by chunk.

    In backward each chunk's logits are made again, so at most `chunk_tokens` x V are alive at any time; value and
    gradient equal those of the dense computation.

    Args:
        terms: the weighted list.
        batch: student and teacher on one batch.
        chunk_tokens: tokens per chunk.
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
    """The training loss: every term's value times its weight."""
    return torch.stack([term.weight * values[term.name] for term in terms]).sum()


def check_terms(terms: Sequence[LossTerm]) -> None:
    """Refuse an empty list, and one name twice.

    Raises:
        ValueError: naming `losses`.
    """
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`losses` is {names}: give at least one loss, and each at most once.")


def token_weights(response_mask: Tensor) -> Tensor:
    """Each real response token's share of a mean over tokens, then rows: [B, R] -> [N], summing to 1."""
    counts = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    rows = (response_mask.sum(dim=1) > 0).sum().clamp(min=1)
    return (response_mask.float() / counts / rows)[response_mask]


def chunks(length: int, size: int, at_least: int = 0) -> list[slice]:
    """Slices that cut `length` tokens into runs of at most `size`, followed by empty ones if those are too few."""
    return [slice(i * size, (i + 1) * size) for i in range(max(ceil(length / size), at_least))]


def _chunk(
    terms: Sequence[TokenLoss], batch: Distilled, student: Tensor, teacher: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    student_logits = batch.student_head(student).float()
    with torch.no_grad():
        teacher_logits = batch.teacher_head(teacher).float()
    return torch.stack([(t.per_token(student_logits, teacher_logits, targets) * weights).sum() for t in terms])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


def _relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)
