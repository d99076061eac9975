"""The base class of criteria, and the context that a criterion may use."""

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
"""A function that is called with lines on the progress of a search."""


@dataclass(frozen=True)
class ScoringContext:
    """The present student, its teacher and the calibration set."""

    student: StagedCausalLM
    teacher: StagedCausalLM
    batches: Sequence[Batch]
    device: torch.device | str = "cpu"
    progress: Progress = lambda line: None
    ranks: Parallel = Parallel()
    """The ranks that take part in the choice."""
    journal: Path | None = None
    """File of evaluations, from which a killed search continues."""
    memory: SearchMemory = SearchMemory()
    """Memory limits of the evaluator."""

    @cached_property
    def redundancy(self) -> dict[Stage, dict[int, float]]:
        """Mean cosine similarity of block input and output, per stage, under the plan at the time of the first use."""
        return block_redundancy(self.student, self.batches, device=self.device, ranks=self.ranks)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Measures the energy of plans: mean KL(teacher || student) over calibration responses, under the contract."""
        return Evaluator(
            self.student, self.teacher, self.batches, device=self.device, memory=self.memory, ranks=self.ranks,
            journal=self.journal,
        )  # fmt: skip

    def counting(self, candidates: int) -> Callable[[int], None]:
        """A progress function for `Evaluator.best` with so many candidates."""
        return lambda done: self.progress(f"{candidates} candidates, {done} batches evaluated")


class Criterion(ABC):
    """Scores candidate drops. A subclass sets `name` and implements `score`."""

    name: ClassVar[str]
    """Name of the criterion in the history of a plan."""
    rescores: ClassVar[bool] = False
    """Whether candidates are scored again after every drop of a round (greedy), or once per round (one-shot)."""

    @abstractmethod
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        """Harm of dropping each candidate from `target`; lower is better.

        Args:
            context: student, teacher and calibration set.
            plan: the plan so far. It changes within a round if `rescores` is True.
            target: the stage(s) to drop from.
            candidates: original indices of blocks that may be dropped.

        Returns:
            Original index -> harm. A candidate that is left out is not dropped.
        """
