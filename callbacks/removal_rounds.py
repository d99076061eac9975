"""Base of the callbacks that remove blocks between distillation epochs, and the context of their searches."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from callbacks.preemption import first_saver, leave_search
from pdtrim_pl.checkpoints.fast_dev_run import limited, trial_batches
from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Move, StagePlan, Target
from pdtrim_pl.search import Guards, distillation_set, refit_kv_only
from pdtrim_pl.sizing.callback_load import CallbackLoad, TellsLoad
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import check_drops, check_merges, parallel_of

log = logging.getLogger(__name__)

WITHOUT_TEACHER = "choose the blocks in a run of its own and start from its plan (`structure.plan`)"
"""What to do in place of a removal where no teacher is loaded."""


class RemovalRounds(Callback, TellsLoad):
    """Removes blocks at the start of some epochs. A subclass says which, in `remove`.

    The module keeps the plan, also in checkpoints. This callback only remembers which rounds are done.

    Args:
        title: name of the callback in messages, such as `decode drops`.
        epochs: epochs with a round, from 0.
        guards: blocks that must stay, and a cap.
        merging: how merged blocks are fitted; null merges none.
        memory: how much a search may keep.
    """

    def __init__(
        self, title: str, epochs: Collection[int], guards: Guards, merging: Merging | None, memory: SearchMemory
    ) -> None:
        self.title, self.guards, self.merging, self.memory = title, guards, merging, memory
        self.epochs = sorted(epochs)
        self.done: list[int] = []

    @property
    def last_round(self) -> int:
        """Epoch of the last round."""
        return max(self.epochs)

    @override
    def load(self) -> CallbackLoad:
        # Each run of blocks is fitted twice, from its first block and from its last.
        fitted = 0 if self.merging is None else 2 * self.merging.pairs_at_once
        return CallbackLoad(
            self.memory, self.merging, fitted, without_teacher=WITHOUT_TEACHER, writes_weights=self.merging is not None
        )

    @abstractmethod
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        """Choose and apply a plan in round `round`, counted from 0."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_drops(trainer.strategy)
        if stage == "fit" and not lasts_until(self.last_round, trainer):
            raise MisconfigurationException(
                f"`schedule` (`epochs`) of the {self.title} has a round at epoch {self.last_round}, and "
                f"`trainer.max_epochs` is {trainer.max_epochs}: epochs count from 0. Raise it or shorten the schedule."
            )
        if stage == "fit" and self.merging is not None:
            check_merges(trainer.strategy, self.merging.tied)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for round, epoch in enumerate(self.epochs):
            if is_due(epoch, trainer) and epoch not in self.done:
                assert isinstance(pl_module, PDTrimModule)
                self.remove(trainer, pl_module, round)
                self.done.append(epoch)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": list(self.done)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = list(state_dict["done"])

    def refit_kv_only(self, trainer: Trainer, module: PDTrimModule, examples: int) -> None:
        """Refit the projections of blocks of which prefill only makes keys and values, if there are any.

        Args:
            trainer: its data module has the text.
            module: the plan has been applied to it.
            examples: number of training examples to fit to.
        """
        if not module.plan.kv_only:
            return
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            result = refit_kv_only(context, refitting_batches(trainer, examples))
        module.apply_plan(result.plan, result.refits)

    def merges(self, trainer: Trainer, context: ScoringContext, start: StagePlan, *targets: Target) -> list[Move]:
        """The distillation sets of some targets; empty without `merging`."""
        if self.merging is None:
            return []
        text = fitting_batches(trainer, self.merging.batches)
        sets = [distillation_set(context, start, target, self.merging, self.guards, text) for target in targets]
        return [merge for merges in sets for merge in merges]


def scoring_context(
    trainer: Trainer, module: PDTrimModule, student: StagedCausalLM, teacher: StagedCausalLM, memory: SearchMemory
) -> ScoringContext:
    """The context of criteria and searches in a run. The first round puts its redundancy into the run's record."""
    context = ScoringContext(
        student, teacher, calibration_batches(trainer), module.device, _Heartbeat(), searching_ranks(trainer),
        journal_file(trainer), memory,
    )  # fmt: skip
    if not any(module.record.redundancy.values()):
        module.record.redundancy = context.redundancy
    return context


def searching_ranks(trainer: Trainer) -> Parallel:
    """The processes of a run, which leave between two evaluations of a search if they are asked to."""
    return parallel_of(trainer.strategy, leave_if_asked=partial(leave_search, trainer))


def lasts_until(epoch: int, trainer: Trainer) -> bool:
    """Whether a run reaches an epoch, counted from 0. A trial does everything in its only epoch."""
    return trial_batches(trainer) is not None or trainer.max_epochs in (None, -1) or epoch < (trainer.max_epochs or 0)


def is_due(epoch: int, trainer: Trainer) -> bool:
    """Whether a round planned for `epoch` happens in the epoch that begins now. In a trial all of them do."""
    return trial_batches(trainer) is not None or epoch == trainer.current_epoch


def journal_file(trainer: Trainer) -> Path | None:
    """The file of evaluations, beside the checkpoints; None in a trial."""
    if trial_batches(trainer) is not None:
        return None
    saver = first_saver(trainer)
    return Path((saver and saver.dirpath) or trainer.default_root_dir) / "search_journal.jsonl"


def removals_of(trainer: Trainer) -> list[RemovalRounds]:
    """The callbacks of a trainer that remove blocks, in order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RemovalRounds)]


def calibration_batches(trainer: Trainer) -> list[Any]:
    """The calibration set of the trainer's data module.

    Raises:
        MisconfigurationException: the data module has none.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise MisconfigurationException(
            "Scoring needs a calibration set: give the trainer a data module with `calibration_dataloader()`, such as "
            "pdtrim_pl.data.PromptResponseDataModule."
        )
    return limited(data.calibration_dataloader(), trainer)


def fitting_batches(trainer: Trainer, batches: Callable[[int], int]) -> list[Any]:
    """The text to fit weights on: training text, or calibration text if the data module is another class.

    Args:
        trainer: its data module has the text.
        batches: how many, of so many examples each.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PromptResponseDataModule):
        return limited(islice(data.fitting_dataloader(), batches(data.eval_batch_size)), trainer)
    return calibration_batches(trainer)


def refitting_batches(trainer: Trainer, examples: int) -> list[Any]:
    """The text to refit layers on: at least two batches, since one judges refits; calibration text for 0."""
    if not examples:
        return calibration_batches(trainer)
    return fitting_batches(trainer, lambda size: max(2, ceil(examples / size)))


class _Heartbeat:
    """Logs the progress of a search, at most every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            log.info("Search: %s.", line)
