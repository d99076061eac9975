"""Drop blocks from one stage between distillation epochs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from pdtrim_pl.criteria import Criterion, ScoringContext
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import Stage, StagePlan, Target
from pdtrim_pl.search import Annealing, Guards, RoundSearch, anneal, choose_drops
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import check_drops, ranks_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepeatedDrop:
    """`blocks` blocks every `every` epochs, from epoch `start`, until `until` blocks are gone from the stage."""

    blocks: int
    every: int
    until: int
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.blocks, self.every, self.until) < 1 or self.start < 0:
            raise ValueError(f"`schedule` needs `blocks`, `every`, `until` of at least 1 and `start` >= 0, got {self}.")

    def by_epoch(self) -> dict[int, int]:
        """The same schedule as {epoch: blocks}."""
        rounds = ceil(self.until / self.blocks)
        return {
            self.start + index * self.every: min(self.blocks, self.until - index * self.blocks)
            for index in range(rounds)
        }


class BlockDrop(Callback):
    """At the start of the scheduled epochs, drops the blocks whose loss a criterion says hurts least.

    Use one instance per stage; they run in the order of the list. The plan lives in the module, so a continued run
    finds it there; this callback only remembers which rounds are done.

    Args:
        stage: `prefill`, `decode`, or `both` (the only choice under `relation: unified`).
        criterion: how harm is measured.
        schedule: {epoch: blocks}, or `blocks`, `every`, `until` and `start` of a repeated drop. Epochs count from 0.
        guards: blocks never to touch, and a cap.
        annealing: after the criterion's choice, search its neighbours for less KL to the teacher; null does not.

    Evaluations are kept in `search_journal.jsonl` beside the checkpoints, so a killed search repeats none.

    Raises:
        ValueError: a schedule with a negative epoch or a count below 1.
    """

    def __init__(
        self,
        stage: Target,
        criterion: Criterion,
        schedule: dict[int, int] | RepeatedDrop,
        guards: Guards = Guards(),
        annealing: Annealing | None = None,
    ) -> None:
        self.stage = stage
        self.criterion = criterion
        # A saved configuration gives the epochs back as strings.
        asked: Mapping[Any, int] = schedule.by_epoch() if isinstance(schedule, RepeatedDrop) else schedule
        self.schedule = {int(epoch): int(count) for epoch, count in asked.items()}
        if not self.schedule or min(self.schedule) < 0 or min(self.schedule.values()) < 1:
            raise ValueError(f"`schedule` of the {stage} drops is {schedule}: give epochs >= 0 and counts >= 1.")
        self.until = schedule.until if isinstance(schedule, RepeatedDrop) else None
        self.guards = guards
        self.annealing = annealing
        self.done: list[int] = []

    @property
    @override
    def state_key(self) -> str:
        return f"BlockDrop[{self.stage}]"

    @property
    def _counted(self) -> Stage:
        """The stage whose blocks are counted; `both` loses the same ones in each."""
        return "decode" if self.stage == "decode" else "prefill"

    @property
    def last_round(self) -> int:
        """Epoch of the last drop."""
        return max(self.schedule)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_drops(trainer.strategy)
        if stage == "fit" and trainer.max_epochs not in (None, -1) and self.last_round >= (trainer.max_epochs or 0):
            raise MisconfigurationException(
                f"`schedule` of the {self.stage} drops has a round at epoch {self.last_round}, and "
                f"`trainer.max_epochs` is {trainer.max_epochs}: epochs count from 0. Raise it or shorten the schedule."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        plan = pl_module.plan
        left = len(plan.drop_candidates(self.stage, self.guards.protect_first, self.guards.protect_last))
        asked = sum(count for epoch, count in self.schedule.items() if epoch not in self.done)
        if self._due(plan, asked) > left:
            raise MisconfigurationException(
                f"`schedule` of the {self.stage} drops asks for {asked} blocks, and only {left} may leave under "
                f"`guards` {self.guards}. Lower the counts, or loosen `guards`."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch in self.schedule and epoch not in self.done:
            assert isinstance(pl_module, PDTrimModule)
            count = self._due(pl_module.plan, self.schedule[epoch])
            if count:
                self._drop(trainer, pl_module, count, round=sorted(self.schedule).index(epoch))
            self.done.append(epoch)

    def _due(self, plan: StagePlan, asked: int) -> int:
        """How many blocks a round drops: `until` counts what is gone, whoever dropped it."""
        return asked if self.until is None else max(0, min(asked, self.until - len(plan.removed(self._counted))))

    def _drop(self, trainer: Trainer, module: PDTrimModule, count: int, round: int) -> None:
        log.info("Round %d: choosing %d block(s) to drop from %s by %s.", round, count, self.stage, self.criterion.name)
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher)
            plan = choose_drops(
                self.criterion, context, module.plan, self.stage, count, round=round, guards=self.guards
            )
            if not any(module.record.redundancy.values()):
                module.record.redundancy = context.redundancy
            if self.annealing is not None:
                plan = self._anneal(context, module.plan, plan, round)
        module.apply_plan(StagePlan.from_json(context.ranks.agree(plan.to_json())))

    def _anneal(self, context: ScoringContext, start: StagePlan, chosen: StagePlan, round: int) -> StagePlan:
        assert self.annealing is not None
        dropped = sorted(set(start.blocks(self._counted)) - set(chosen.blocks(self._counted)))
        search = RoundSearch(context.evaluator, start, self.stage, len(dropped), self.guards)
        best, energy = anneal(search, search.drops(dropped), self.annealing, context.progress)
        return search.final(best, round, "annealing", energy)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": list(self.done)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = list(state_dict["done"])


def scoring_context(
    trainer: Trainer, module: PDTrimModule, student: StagedCausalLM, teacher: StagedCausalLM
) -> ScoringContext:
    """What criteria and searches look at in a run."""
    return ScoringContext(
        student, teacher, calibration_batches(trainer), module.device, _Heartbeat(), ranks_of(trainer.strategy),
        journal_file(trainer),
    )  # fmt: skip


def journal_file(trainer: Trainer) -> Path:
    """Where a search keeps what it knows: beside the checkpoints."""
    saver = trainer.checkpoint_callback
    folder = saver.dirpath if isinstance(saver, ModelCheckpoint) else None
    return Path(folder or trainer.default_root_dir) / "search_journal.jsonl"


class _Heartbeat:
    """Says how far a search is, at most every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            log.info("Search: %s.", line)


def drops_of(trainer: Trainer) -> list[BlockDrop]:
    """The block-drop callbacks of a trainer, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, BlockDrop)]  # type: ignore[attr-defined]


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
    return list(data.calibration_dataloader())
