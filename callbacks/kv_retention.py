"""Chooses which KV entries cross from prefill to decode, after the last round of drops."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from callbacks.export_pair import ExportPair
from callbacks.removal_rounds import (
    RemovalRounds,
    calibration_batches,
    is_due,
    journal_file,
    lasts_until,
    removals_of,
    searching_ranks,
)
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import KVRetentionPolicy, KVShape
from pdtrim_pl.selectors import KVSelector, selection_context
from pdtrim_pl.sizing.callback_load import CallbackLoad, TellsLoad
from pdtrim_pl.staged.description import kv_shape_of

log = logging.getLogger(__name__)


class KVRetention(Callback, TellsLoad):
    """Sets the KV retention policy right after the last round of drops.

    The remaining epochs distil the student under the policy. List it after every BlockDrop.

    Args:
        selector: chooses what each block of D sends, and in how many bits.
        epoch: when to choose; by default at the last drop, or at the start if nothing drops.

    Raises:
        UserError: a negative epoch.
    """

    def __init__(self, selector: KVSelector, epoch: int | None = None) -> None:
        if epoch is not None and epoch < 0:
            raise UserError(f"`epoch` of the KV retention is {epoch}: epochs count from 0.")
        self.selector = selector
        self.epoch = epoch
        self.done = False

    @property
    @override
    def state_key(self) -> str:
        return "KVRetention"

    @override
    def load(self) -> CallbackLoad:
        return CallbackLoad(selection=self.selector.load(), without_teacher="choose it afterwards with `pdtrim policy`")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(isinstance(callback, RemovalRounds) for callback in callbacks[callbacks.index(self) :]):
            raise MisconfigurationException("KVRetention must stand after every BlockDrop in `trainer.callbacks`.")
        due, last = self._due(trainer), _last_round(trainer)
        if due < last:
            raise MisconfigurationException(
                f"`epoch` of the KV retention is {due}, before the last drop at epoch {last}: a policy is chosen for "
                "the final plan. Raise it, or leave it out."
            )
        if stage == "fit" and not lasts_until(due, trainer):
            raise MisconfigurationException(
                f"`epoch` of the KV retention is {due}, and `trainer.max_epochs` is {trainer.max_epochs}: epochs count "
                "from 0."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done or not is_due(self._due(trainer), trainer):
            return
        assert isinstance(pl_module, PDTrimModule)
        self._choose(trainer, pl_module)
        self.done = True

    def _due(self, trainer: Trainer) -> int:
        return self.epoch if self.epoch is not None else _last_round(trainer)

    def _choose(self, trainer: Trainer, module: PDTrimModule) -> None:
        log.info("Choosing which KV entries to send.")
        module.apply_policy(None)
        shape = wire_shape(trainer, module)
        with evaluating(module) as (student, teacher):
            ranks = searching_ranks(trainer)
            context = selection_context(
                student, teacher, calibration_batches(trainer), shape, module.device, self.selector.first,
                self.selector.last, memory=_memory(trainer), ranks=ranks, journal=journal_file(trainer),
            )  # fmt: skip
            rules = ranks.agree(self.selector.select(context))
            if self.selector.looks_at_mass:
                module.record.attention_mass = dict(context.mass)
        policy = KVRetentionPolicy(module.plan.boundary, shape, rules)
        module.apply_policy(policy)
        trimmed = sum(rule.keep != "all" for rule in rules.values())
        ways = [f"{len(blocks)} {codec}" for codec, blocks in policy.codecs(module.plan).items()]
        log.info(
            "%d of %d decode blocks send only first and last positions; in few bits: %s; 1024 prompt tokens: %.2f "
            "times fewer bytes.",
            trimmed, len(module.plan.decode), "; ".join(ways) or "none", context.sent_ratio(rules),
        )  # fmt: skip

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])


def wire_shape(trainer: Trainer, module: PDTrimModule) -> KVShape:
    """The KV as it will cross: in the element type of the export, not in that of the weights that train."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    dtypes = [callback.dtype for callback in callbacks if isinstance(callback, ExportPair)]
    return kv_shape_of(module.student.model, *dtypes[:1])


def _memory(trainer: Trainer) -> SearchMemory:
    """How much may be kept of the prompts: what the run's searches for removals may."""
    kept = (rounds.memory for rounds in removals_of(trainer))
    return max(kept, key=lambda memory: memory.base, default=SearchMemory())


def _last_round(trainer: Trainer) -> int:
    return max((rounds.last_round for rounds in removals_of(trainer)), default=0)
