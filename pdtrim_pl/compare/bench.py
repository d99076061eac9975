"""The bench: model, teacher, texts and training, the same for every method."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.meter import Meter, Spent
from pdtrim_pl.compare.settings import Subject, Training
from pdtrim_pl.compare.texts import Texts
from pdtrim_pl.compare.training import distil
from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.data import Batch
from pdtrim_pl.merging import FittedRuns, Merging, fit_runs
from pdtrim_pl.models.loading import TORCH_DTYPES, DType, dtype_of, warn_of_slow_bf16
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Boundary, Relation, StagePlan
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.merges import neighbours
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.strategies.layer_rates import LayerRates

log = logging.getLogger(__name__)

KeepSpent = Callable[[Spent], None]


class Bench:
    """Everything that a method works with.

    Args:
        subject: the model to trim.
        texts: calibration, held-out and training text.
        training: settings of the training, for methods that train.
        guards: limits on removals.
        request: prompt and response tokens of the request for which costs are counted.
        folder: root folder of Lightning.
    """

    def __init__(
        self, subject: Subject, texts: Texts, training: Training, guards: Guards, request: tuple[int, int], folder: Path
    ) -> None:
        self.subject, self.texts, self.training, self.guards, self.folder = subject, texts, training, guards, folder
        self.device = subject.device
        self._meter = Meter()
        self._journal: Path | None = None
        self._keep: KeepSpent = lambda spent: None
        self._fitted: dict[Merging, FittedRuns] = {}
        self._original = self._load(subject.dtype)
        warn_of_slow_bf16(self.device, self._original.dtype)
        self.model = reference_to(self._original, subject.name)
        self.teacher = self._fresh(subject.dtype).to(self.device).eval().requires_grad_(False)
        self.model = self.teacher.plan.model  # this reference also names the adapter
        self.costs = CostModel.of(self.teacher, *request)

    @contextmanager
    def row(self, journal: Path, keep: KeepSpent) -> Iterator[Meter]:
        """Measure the search cost of one row.

        Args:
            journal: file of the row's evaluations.
            keep: called with the cost so far from time to time, and when an error ends the row.
        """
        self._meter, self._keep, self._journal = Meter(), keep, journal
        keep(self._meter.spent)
        try:
            with self._meter.running():
                yield self._meter
        except BaseException:
            self._keep(self._meter.spent)
            raise

    def full(self, relation: Relation, boundary: Boundary = "prefill") -> StagePlan:
        """The plan of the unpruned model."""
        return StagePlan.full(self.model, relation, boundary)

    def student(self, found: Found, *, dtype: DType | None = None) -> StagedCausalLM:
        """Build the student of a result, in eval mode. Its work is measured."""
        student = self._fresh(dtype or self.subject.dtype)
        student.apply_plan(found.plan)
        student.apply_policy(found.policy)
        stray = student.load_state_dict(dict(found.weights), strict=False).unexpected_keys
        assert not stray, f"{stray} are not weights of this student"
        student.to(self.device).eval()
        self._meter.watch(student)
        return student

    def context(self, student: StagedCausalLM) -> ScoringContext:
        """The context of criteria and searches. Evaluations that a killed run has made are not repeated."""
        return ScoringContext(
            student, self.teacher, self.texts.calibration, self.device, self.progress(), journal=self._journal
        )

    def progress(self) -> Callable[[str], None]:
        """A function that logs the progress of a search, at most every twenty seconds."""
        last = time.monotonic()

        def say(line: str) -> None:
            nonlocal last
            if time.monotonic() - last >= 20:
                last = time.monotonic()
                log.info("  %s", line)
                self._keep(self._meter.spent)

        return say

    def fit_pairs(self, student: StagedCausalLM, merging: Merging) -> FittedRuns:
        """Fit one block to every pair of neighbours that the guards allow, and offer them to the student.

        The fits use training text, since on the calibration set, which scores removals, merges would look better than
        they are. They are made once, and their cost counts for every row that uses them.
        """
        with self._meter.paused():
            if merging not in self._fitted:
                pairs = neighbours(student.plan, "both", merging, self.guards)
                size = self.training.batch_size
                batches, _ = self.texts.training_batches(self.training.tokens, size)
                self._fitted[merging] = self.fit(student, batches[: merging.batches(size)], pairs, merging)
            fitted = self._fitted[merging]
            self.charge(fitted)
        student.offer(fitted.accepted)
        log.info("  %d of %d pairs can merge", len(fitted.accepted), len(fitted.runs))
        return fitted

    def fit(
        self, student: StagedCausalLM, batches: Sequence[Batch], runs: Sequence[tuple[int, ...]], merging: Merging,
        trailing_blocks: int = 0,
    ) -> FittedRuns:  # fmt: skip
        """Fit one block to each run of neighbours, for both stages: float32 weights, arithmetic in `model.dtype`."""
        half = self.subject.dtype in ("bfloat16", "float16")
        with torch.autocast(self.device.type, TORCH_DTYPES[self.subject.dtype]) if half else nullcontext():
            return fit_runs(
                student, self.teacher, batches, "both", runs, merging, device=self.device, progress=self.progress(),
                trailing_blocks=trailing_blocks,
            )  # fmt: skip

    def target_of(self, found: Found) -> CostTarget:
        """The costs of a result, as a target for another one."""
        return CostTarget(**asdict(self.costs.shares(found.plan, found.policy)))

    def refitting_text(self, tokens: int, skip: int = 0) -> tuple[Sequence[Batch], int]:
        """The text to make blocks narrower on, and its number of tokens: training text, or for 0 the calibration set.

        The calibration set is not trained on, so it counts 0 tokens.

        Args:
            tokens: maximum number of tokens.
            skip: tokens of the training text that were used before.
        """
        if not tokens:
            return self.texts.calibration, 0
        return self.texts.training_batches(tokens, self.training.batch_size, skip=skip)

    def charge(self, fitted: FittedRuns) -> None:
        """Add the cost of fits that were not measured to the search cost."""
        self._meter.add(Spent(fitted.seconds, fitted.block_tokens))

    @contextmanager
    def unmetered(self) -> Iterator[None]:
        """Work inside the `with` block is training and does not count as search cost."""
        with self._meter.paused():
            yield

    def changed(self, student: StagedCausalLM) -> dict[str, Tensor]:
        """Weights of a student that differ from the original model, by name, on the CPU."""
        own = dict(self.teacher.named_parameters())
        return {
            name: weight.detach().cpu()
            for name, weight in student.named_parameters()
            if name not in own or not torch.equal(weight.to(own[name].dtype), own[name])
        }

    def distil(self, found: Found, tokens: int, rate: float = 1.0, layer_rates: LayerRates | None = None) -> Found:
        """Train a result on at most `tokens` tokens. The training does not count as search cost.

        Args:
            found: the result to train.
            tokens: maximum number of prompt and response tokens.
            rate: factor of the optimizer's learning rate.
            layer_rates: further factors by block; None for none.
        """
        with self.unmetered(), torch.enable_grad():
            student = self.student(found, dtype="float32")
            settings = self.training
            batches, seen = self.texts.training_batches(
                tokens, settings.batch_size, settings.prompt, skip=found.trained_tokens
            )
            log.info("  training on %d tokens", seen)
            weights = distil(student, self.teacher, batches, settings, self.subject, self.folder, rate, layer_rates)
            self.teacher.to(self.device)  # Lightning leaves what it has trained on the CPU
        return Found(found.plan, found.policy, {**found.weights, **weights}, found.trained_tokens + seen)

    def _fresh(self, dtype: DType) -> StagedCausalLM:
        """A new copy of the original model in an element type. If the type differs, weights are loaded again."""
        model = copy.deepcopy(self._original) if dtype == self.subject.dtype else self._load(dtype)
        return StagedCausalLM(model, self.full("nested"), architecture=self.subject.architecture)

    def _load(self, dtype: DType) -> PreTrainedModel:
        return load_causal_lm(self.subject.name, dtype=dtype_of(dtype), architecture=self.subject.architecture)
