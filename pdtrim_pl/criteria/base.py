"""The base of every criterion, and what a criterion may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.redundancy import block_redundancy
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Stage, StagePlan, Target
from pdtrim_pl.staged import StagedCausalLM

Progress = Callable[[str], None]
"""Called with a line that says how far a search is."""


@dataclass(frozen=True)
class ScoringContext:
    """The student as it is now, its teacher, and the calibration set."""

    student: StagedCausalLM
    teacher: StagedCausalLM
    batches: Sequence[Batch]
    device: torch.device | str = "cpu"
    progress: Progress = lambda line: None
    ranks: Parallel = Parallel()
    """The processes that choose together."""
    journal: Path | None = None
    """File of evaluations; a search that was killed finds there what it knew."""
    memory: SearchMemory = SearchMemory()
    """How much the evaluator may keep."""

    @cached_property
    def redundancy(self) -> dict[Stage, dict[int, float]]:
        """Mean cosine between block input and output, per stage, under the student's plan when first asked for."""
        return block_redundancy(self.student, self.batches, device=self.device, ranks=self.ranks)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Energy of any plan: mean KL to the teacher over the calibration responses, under the contract."""
        return Evaluator(
            self.student, self.teacher, self.batches, device=self.device, memory=self.memory, ranks=self.ranks,
            journal=self.journal,
        )  # fmt: skip

    def counting(self, candidates: int) -> Callable[[int], None]:
        """What `Evaluator.best` calls on its way through so many candidates."""
        return lambda done: self.progress(f"{candidates} candidates, {done} batches evaluated")


class Criterion(ABC):
    """Scores candidate drops. A subclass names itself and writes `score`."""

    name: ClassVar[str]
    """Under this name its choices stand in the plan's history."""
    rescores: ClassVar[bool] = False
    """Whether scores change with every drop of a round (greedy) or hold for the whole round (one-shot)."""

    @abstractmethod
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        """Harm of dropping each candidate from `target`, lower is less; a candidate left out is not considered.

        Args:
            context: student, teacher and calibration set.
            plan: the plan so far; under a re-scoring criterion it changes within a round.
            target: the stage(s) to drop from.
            candidates: original indices of blocks that may go.
        """
