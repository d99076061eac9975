"""The results of the teacher on a data part. They are computed once and serve every comparison with a student.

Shapes: B batch, P prompt tokens, R response tokens, N response tokens of a batch without padding, H hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.tokens import CHUNK_TOKENS, Distributions, TokenScores, final_hidden, score_tokens
from pdtrim_pl.losses import Head, chunks
from pdtrim_pl.staged import StagedCausalLM

STATES = 2 * 2**30
"""Default for the maximum number of bytes of hidden states to keep."""


class TeacherReference:
    """The teacher's final hidden states and distributions over the response tokens of a data part.

    The teacher runs prefill and decode like a student. One causal pass would be enough for it, but would round
    differently: a student equal to its teacher would have a KL of 1e-3 nats in bf16, and above 0 in fp32.

    Results are computed when they are first needed, and kept as far as the limits allow. Other results are computed
    again every time: for hidden states the teacher runs, for distributions only its head.

    Args:
        teacher: the teacher in eval mode, under its own plan and policy. Its weights must not change during the
            lifetime of this object.
        batches: requests with known responses. With several ranks, the share of this rank.
        device: device of the teacher.
        peers: for each batch, the batches that all ranks run at the same time, this one included. All ranks keep as
            much as the largest of them allow, and call heads equally often. By default, each batch is alone.
        states: maximum number of bytes of hidden states to keep.
        probabilities: maximum number of bytes of distributions (fp32) to keep.
    """

    def __init__(
        self, teacher: StagedCausalLM, batches: Sequence[Batch], *, device: torch.device | str = "cpu",
        peers: Sequence[Sequence[Batch]] | None = None, states: int = STATES, probabilities: int = 0,
    ) -> None:  # fmt: skip
        self.teacher = teacher
        self.batches = [batch.on(device) for batch in batches]
        self.targets = [batch.response_ids[batch.response_mask] for batch in self.batches]
        lengths = [
            max(int(batch.response_mask.sum()) for batch in group)
            for group in peers or [[batch] for batch in self.batches]
        ]
        self.calls = [len(chunks(length, CHUNK_TOKENS)) for length in lengths]
        """For each batch, the number of calls of a head."""
        config = teacher.model.config
        state = config.hidden_size * teacher.model.dtype.itemsize
        row = (teacher.compared_tokens or config.vocab_size) * torch.float32.itemsize
        self._keeps_states = _fitting([length * state for length in lengths], states)
        self._keeps_distributions = _fitting([length * row for length in lengths], probabilities)
        self._states: dict[int, Tensor] = {}
        self._distributions: dict[int, Distributions] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute now everything that will be kept."""
        for index in range(len(self.batches)):
            if self._keeps_states[index]:
                self.states(index)
            self.distributions(index)

    @torch.no_grad()
    def states(self, index: int) -> Tensor:
        """The teacher's final hidden states that predict the response tokens of batch `index`, [N, H]."""
        if index in self._states:
            return self._states[index]
        states = final_hidden(self.teacher, self.batches[index])
        if self._keeps_states[index]:
            self._states[index] = states
        return states

    def distributions(self, index: int) -> Distributions | None:
        """The teacher's distributions over the response tokens of batch `index`; None if they are not kept."""
        if self._keeps_distributions[index] and index not in self._distributions:
            found = Distributions.of(self.teacher.compared_logits, self.states(index), min_chunks=self.calls[index])
            self._distributions[index] = found
        return self._distributions.get(index)

    def scores(self, index: int, hidden: Tensor, head: Head) -> TokenScores:
        """Compare a student with the teacher on one batch, token by token.

        Args:
            index: number of the batch.
            hidden: the student's final hidden states, [N, H].
            head: the student's head, from hidden states to logits.
        """
        theirs, targets = self.states(index), self.targets[index]
        return score_tokens(hidden, theirs, targets, head, self.teacher.compared_logits, min_chunks=self.calls[index])

    def compare(self, index: int, hidden: Tensor, head: Head) -> tuple[float, float]:
        """KL(teacher || student) and NLL of a student on one batch, summed in fp64, nats; arguments as of `scores`."""
        kept = self.distributions(index)
        if kept is not None:
            return kept.compare(head, hidden, self.targets[index], min_chunks=self.calls[index])
        scores = self.scores(index, hidden, head)
        return float(scores.kl.double().sum()), float(scores.nll.double().sum())


def _fitting(sizes: Sequence[int], budget: int) -> list[bool]:
    """For each size, in order, whether it and all sizes before it fit into `budget` together."""
    kept = []
    for size in sizes:
        budget -= size
        kept.append(budget >= 0)
    return kept
