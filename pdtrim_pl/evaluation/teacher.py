"""What comparisons with a teacher need of it, made once for a data part.

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
"""Bytes of hidden states that are kept, where nobody says how many."""


class TeacherReference:
    """The teacher's final hidden states over the responses of a data part, and distributions where there is room.

    The teacher takes the same two passes as a student, though a whole one could do in one causal pass: the two round
    differently, and a student that is its teacher would have a KL of 1e-3 nats in bf16, and not quite 0 in fp32.

    Each is made when it is first asked for, and kept as long as all that is kept fits. What does not fit is made again
    every time: the teacher runs again for states, its head for distributions.

    Args:
        teacher: under its own plan and policy, in eval mode; its weights must not change while this lives.
        batches: requests with known responses; under several ranks, this rank's share.
        device: where the teacher is.
        peers: per batch, those of all ranks that run at the same time, this rank's with them: all keep what the
            largest ones leave room for, and call heads equally often. Each batch alone by default.
        states: most bytes of hidden states to keep.
        probabilities: most bytes of distributions to keep, fp32.
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
        """Per batch, how often heads are called."""
        config = teacher.model.config
        state = config.hidden_size * teacher.model.dtype.itemsize
        row = (teacher.compared_tokens or config.vocab_size) * torch.float32.itemsize
        self._keeps_states = _fitting([length * state for length in lengths], states)
        self._keeps_distributions = _fitting([length * row for length in lengths], probabilities)
        self._states: dict[int, Tensor] = {}
        self._distributions: dict[int, Distributions] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Make now what is kept."""
        for index in range(len(self.batches)):
            if self._keeps_states[index]:
                self.states(index)
            self.distributions(index)

    @torch.no_grad()
    def states(self, index: int) -> Tensor:
        """Final hidden states that predict one batch's response tokens, [N, H]."""
        if index in self._states:
            return self._states[index]
        states = final_hidden(self.teacher, self.batches[index])
        if self._keeps_states[index]:
            self._states[index] = states
        return states

    def distributions(self, index: int) -> Distributions | None:
        """Of one batch's response tokens; None where they are not kept."""
        if self._keeps_distributions[index] and index not in self._distributions:
            found = Distributions.of(self.teacher.compared_logits, self.states(index), min_chunks=self.calls[index])
            self._distributions[index] = found
        return self._distributions.get(index)

    def scores(self, index: int, hidden: Tensor, head: Head) -> TokenScores:
        """Compare a student on one batch, token by token.

        Args:
            index: the batch.
            hidden: the student's final hidden states, [N, H].
            head: the student's.
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
    """Which of some things, the first ones, fit into so many bytes together."""
    kept = []
    for size in sizes:
        budget -= size
        kept.append(budget >= 0)
    return kept
