"""Measure every row: quality on held-out text, tasks of lm-evaluation-harness, recall, and costs."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.outcome import Judged
from pdtrim_pl.compare.settings import RECALL, Measures
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.quality import quality_against
from pdtrim_pl.evaluation.recall import measure_recall, repeated_requests
from pdtrim_pl.evaluation.teacher import TeacherReference
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.harness.scores import main_score, scores_of
from pdtrim_pl.harness.tasks import Tasks
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import stop_ids_of


class Judge:
    """Measures students on the held-out text of the bench. The teacher runs on this text once.

    Args:
        bench: model, teacher and texts.
        measures: what to measure.
        tokenizer: tokenizer of the model.

    Raises:
        UserError: a task is unknown or has no data, or tasks are asked for without the harness.
    """

    def __init__(self, bench: Bench, measures: Measures, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bench, self.tokenizer = bench, tokenizer
        self.tasks = Tasks(measures.of_tasks) if measures.tasks else None
        self.reference = TeacherReference(bench.teacher, bench.texts.held_out, device=bench.device)
        again = repeated_requests(bench.texts.held_out, bench.texts.collate, measures.recall)
        self.again = [batch.on(bench.device) for batch in again]

    def fingerprint(self) -> dict[str, str]:
        """Task -> hash of its settings and documents."""
        return {} if self.tasks is None else self.tasks.fingerprint()

    @torch.no_grad()
    def judge(self, student: StagedCausalLM) -> Judged:
        """Quality and costs of a student under its own plan and policy."""
        quality = quality_against(self.reference, student)
        values = (quality.nll, quality.teacher_nll, quality.kl, quality.agreement)
        costs = self.bench.costs.shares(student.plan, student.policy)
        return Judged(*values, **asdict(costs))

    def accuracy(self, model: StagedCausalLM) -> dict[str, float]:
        """Share of right answers by task, see `main_score`; and recall under `RECALL`, if it is measured.

        Raises:
            UserError: a task has no share of right answers.
        """
        shares = {} if self.tasks is None else self._shares(self.tasks, model)
        return {**shares, RECALL: measure_recall(model, self.again)} if self.again else shares

    def _shares(self, tasks: Tasks, model: StagedCausalLM) -> dict[str, float]:
        from pdtrim_pl.harness.model import InProcessLM

        stop_ids = stop_ids_of(model.model, self.tokenizer)
        lm = InProcessLM(InProcessPair.of(model), self.tokenizer, stop_ids, batch_size=tasks.settings.batch_size)
        scores = scores_of(tasks.run(lm))
        found = {name: main_score(scores, name) for name in dict.fromkeys(score.task for score in scores)}
        if wrong := [name for name, score in found.items() if not score.higher_is_better]:
            raise UserError(f"`measures.tasks`: {', '.join(wrong)} has no share of right answers. Leave it out.")
        return {name: score.value for name, score in found.items()}
