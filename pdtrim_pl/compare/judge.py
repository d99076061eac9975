"""Measure every row: quality on held-out text, accuracy on multiple choice, recall, and costs."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.outcome import Judged
from pdtrim_pl.compare.settings import RECALL, Measures
from pdtrim_pl.evaluation.multiple_choice import TokenQuestion, encode_questions, measure_accuracy, read_questions
from pdtrim_pl.evaluation.quality import quality_against
from pdtrim_pl.evaluation.recall import measure_recall, repeated_requests
from pdtrim_pl.evaluation.teacher import TeacherReference
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.staged import StagedCausalLM


class Judge:
    """Measures students on the held-out text of the bench. The teacher runs on this text once.

    Args:
        bench: model, teacher and texts.
        measures: what to measure.
        tokenizer: tokenizer of the model.
    """

    def __init__(self, bench: Bench, measures: Measures, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bench = bench
        self.reference = TeacherReference(bench.teacher, bench.texts.held_out, device=bench.device)
        longest = min(usable_context(bench.teacher.model.config.to_dict()), measures.choice_tokens)
        self.questions: dict[str, list[TokenQuestion]] = {
            name: encode_questions(read_questions(path, measures.choice_rows), tokenizer, longest)
            for name, path in measures.choices.items()
        }
        again = repeated_requests(bench.texts.held_out, bench.texts.collate, measures.recall)
        self.again = [batch.on(bench.device) for batch in again]

    @torch.no_grad()
    def judge(self, student: StagedCausalLM) -> Judged:
        """Quality and costs of a student under its own plan and policy."""
        quality = quality_against(self.reference, student)
        values = (quality.nll, quality.teacher_nll, quality.kl, quality.agreement)
        costs = self.bench.costs.shares(student.plan, student.policy)
        return Judged(*values, **asdict(costs))

    def accuracy(self, model: StagedCausalLM) -> dict[str, float]:
        """Share of right answers by multiple-choice set, with choices ranked by log-likelihood per character.

        Includes recall under `RECALL`, if it is measured.
        """
        device = self.bench.device
        shares = {
            name: measure_accuracy(model, questions, device=device).normalised
            for name, questions in self.questions.items()
        }
        return {**shares, RECALL: measure_recall(model, self.again)} if self.again else shares
