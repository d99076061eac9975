"""Means of a validation or test epoch over the response tokens of all ranks."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torchmetrics import MeanMetric

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.tokens import final_hidden, score_tokens
from pdtrim_pl.losses import chunks
from pdtrim_pl.staged import StagedCausalLM


class QualityMeans:
    """Running means of token scores, in fp64 if the device supports it.

    This is not an `nn.Module`, so that `precision: bf16-true` does not cast the sums.

    Args:
        device: device of the scores.
        alone: whether there is no teacher.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.alone = alone
        names = ("nll",) if alone else ("nll", "teacher_nll", "kl", "agreement")
        self._means = {name: MeanMetric() for name in names}
        for mean in self._means.values():
            mean.set_dtype(exact).to(device)

    def measure(
        self, student: StagedCausalLM, teacher: StagedCausalLM, batch: Batch, chunk_tokens: int, min_chunks: int
    ) -> None:
        """Run both models on one batch, and add the scores of its response tokens; see `score_tokens`."""
        scores = score_tokens(
            final_hidden(student, batch), final_hidden(teacher, batch), batch.response_ids[batch.response_mask],
            student.compared_logits, teacher.compared_logits, chunk_tokens, min_chunks,
        )  # fmt: skip
        for name, column in vars(scores).items():
            self._means[name].update(column)

    def measure_alone(self, student: StagedCausalLM, batch: Batch, chunk_tokens: int, min_chunks: int) -> None:
        """Run the student on one batch where there is no teacher, and add the likelihoods of its response tokens."""
        hidden, targets = final_hidden(student, batch), batch.response_ids[batch.response_mask]
        for part in chunks(len(targets), chunk_tokens, min_chunks):
            nll = F.cross_entropy(student.compared_logits(hidden[part]).float(), targets[part], reduction="none")
            self._means["nll"].update(nll)

    def compute(self) -> dict[str, float]:
        """Response perplexities, KL in nats and top-1 agreement; without a teacher, the student's perplexity alone.

        With several ranks this is a collective.
        """
        if self.alone:
            return {"ppl": float(self._means["nll"].compute().exp())}
        means = {name: float(metric.compute()) for name, metric in self._means.items()}
        return {
            "ppl": float(torch.tensor(means["nll"]).exp()),
            "teacher_ppl": float(torch.tensor(means["teacher_nll"]).exp()),
            "kl": means["kl"],
            "agreement": means["agreement"],
        }
