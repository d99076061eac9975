"""The part of the module that measures the student in validation and test."""

from __future__ import annotations

from abc import abstractmethod

from typing_extensions import override

from pdtrim_pl.checkpoints.resumable import ResumableModule
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.metrics import QualityMeans
from pdtrim_pl.evaluation.spread import shared_step
from pdtrim_pl.staged import StagedCausalLM


class MeasuredModule(ResumableModule):
    """Measures the student against the teacher. A subclass builds both."""

    teacher: StagedCausalLM
    """Absent if the student is alone."""
    chunk_tokens: int
    """Number of response tokens whose logits are in memory at once."""
    _means: QualityMeans | None = None

    @property
    @abstractmethod
    def is_alone(self) -> bool:
        """Whether there is no teacher to compare with."""

    @override
    def on_validation_epoch_start(self) -> None:
        self._means = QualityMeans(self.device, alone=self.is_alone)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._log_quality("val")
        if not self.trainer.sanity_checking:
            self.record.validations.append((self.global_step, values))

    @override
    def on_test_epoch_start(self) -> None:
        self._means = QualityMeans(self.device, alone=self.is_alone)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_quality("test")

    def _measure(self, batch: Batch) -> None:
        assert self._means is not None
        batch, min_chunks = shared_step(self.parallel, batch, self.chunk_tokens)
        if self._means.alone:
            self._means.measure_alone(self.student, batch, self.chunk_tokens, min_chunks)
        else:
            self._means.measure(self.student, self.teacher, batch, self.chunk_tokens, min_chunks)

    def _log_quality(self, prefix: str) -> dict[str, float]:
        assert self._means is not None
        values = self._means.compute()
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        return values
