"""Removes blocks and channels from both stages and KV from the wire, by one search against a target of costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from callbacks.kv_retention import KVRetention, wire_shape
from callbacks.removal_rounds import (
    RemovalRounds,
    calibration_batches,
    journal_file,
    refitting_batches,
    scoring_context,
)
from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule, evaluating
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Move, StagePlan
from pdtrim_pl.search import Annealing, Guards, JointSearch, Narrowed, Narrowing, WidthMoves, anneal, check_units, mixed
from pdtrim_pl.search.joint import PolicyOf
from pdtrim_pl.selectors import SelectorLoad, WireMenu, policies_within, selection_context
from pdtrim_pl.sizing.callback_load import EVERY_BLOCK, CallbackLoad
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.strategies import check_new_widths

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestShape:
    """The request whose cost counts."""

    prompt: int = 1024
    """Tokens of the prompt."""
    response: int = 256
    """Tokens of the response."""


class JointDrop(RemovalRounds):
    """Searches both stages at once for the least KL that meets a cost target, at the start of the scheduled epochs.

    Needs `relation: free`. With `wire_bytes` below 1 it chooses the KV policy too: then leave out KVRetention.

    Args:
        target: the most that a request may cost after the last round, as shares of the dense model.
        epochs: epochs with a round, from 0. Each of n rounds goes one n-th of the way to the target.
        request: prompt and response lengths that the costs are counted for.
        guards: blocks that must stay, and a cap per stage.
        wire: what blocks may send where `wire_bytes` is below 1.
        annealing: improve the greedy choice by simulated annealing; null does not.
        merging: offer merges beside plain drops: one block, fitted to two neighbours of a stage, stands for both.
        width: try narrower blocks too, alone and together with removals; null removes whole blocks only. With its
            `examples`, keys and values of blocks that prefill alone has lost are refitted after a round.
        memory: how much a search may keep on the models' device.

    Raises:
        UserError: no epoch, an epoch below 0, a target that asks for nothing, or merges `tied` in both stages.
    """

    def __init__(
        self,
        target: CostTarget,
        epochs: list[int],
        request: RequestShape = RequestShape(),
        guards: Guards = Guards(),
        wire: WireMenu = WireMenu(),
        annealing: Annealing | None = Annealing(),
        merging: Merging | None = None,
        width: WidthMoves | None = None,
        memory: SearchMemory = SearchMemory(),
    ) -> None:
        if not epochs or min(epochs) < 0 or len(set(epochs)) < len(epochs):
            raise UserError(f"`epochs` of the joint drops is {epochs}: give different epochs >= 0.")
        if target == CostTarget():
            raise UserError("`target` of the joint drops asks for nothing: set at least one share below 1.")
        if merging is not None and merging.tied:
            raise UserError(
                "`merging.tied` of the joint drops: a joint search merges in one stage at a time, a tied merge is in "
                "both. Set it to false, or merge with BlockDrop."
            )
        super().__init__("joint drops", epochs, guards, merging, memory)
        self.target, self.request, self.wire, self.annealing = target, request, wire, annealing
        self.width = width

    @property
    @override
    def state_key(self) -> str:
        return "JointDrop"

    @override
    def load(self) -> CallbackLoad:
        # To choose the policy, it measures what blocks may send, as a KV selector does.
        selection = SelectorLoad(examples=self.wire.examples) if self.target.wire_bytes < 1 else None
        load = replace(super().load(), selection=selection)
        if self.width is None:
            return load
        # Prefill alone, decode alone, and both where they lose the same.
        offered = sum(share > 0 for share in self.width.shares) * (3 if self.width.shared else 2)
        return replace(
            load,
            narrowed_on=self.width.examples,
            widths_offered=offered if self.width.examples else 0,
            writes_weights=True,
            untied=dict.fromkeys(STAGES, EVERY_BLOCK) if self.width.examples else {},
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self.target.wire_bytes < 1 and any(isinstance(callback, KVRetention) for callback in callbacks):
            raise MisconfigurationException(
                f"JointDrop with `target.wire_bytes: {self.target.wire_bytes}` chooses what KV to send, and so does "
                "KVRetention. Leave KVRetention out, or set `wire_bytes: 1.0`."
            )
        if stage == "fit" and self.width is not None:
            check_new_widths(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if pl_module.plan.relation != "free":
            raise MisconfigurationException(
                f"JointDrop needs `structure.relation: free`, and the plan has `{pl_module.plan.relation}`. Set it, or "
                "use BlockDrop."
            )
        if self.width is not None:
            part = self.width.part
            cut = pl_module.student.architecture.cuts.get(part)
            check_units(cut, pl_module.plan, Narrowing("both", part, 0, self.width.criterion))

    def share(self, round: int) -> CostTarget:
        """The target of one round."""
        way = (round + 1) / len(self.epochs)
        return CostTarget(**{name: 1.0 - (1.0 - share) * way for name, share in vars(self.target).items()})

    @override
    def remove(self, trainer: Trainer, module: PDTrimModule, round: int) -> None:
        log.info("Round %d: searching both stages for %s.", round, self.share(round))
        with evaluating(module) as (student, teacher):
            context = scoring_context(trainer, module, student, teacher, self.memory)
            merges = self.merges(trainer, context, module.plan, *STAGES)
            cost = CostModel.of(student, self.request.prompt, self.request.response)
            starts = self._starts(trainer, context, module.plan, round, cost)
            policies = self._policies(trainer, module, context, round)
            index, plan, policy = self._chosen(context, starts, round, merges, policies, cost)
        sent = None if policy is None else policy.to_json(plan)
        index, structure, sent = context.ranks.agree((index, plan.to_json(), sent))
        plan = StagePlan.from_json(structure)
        module.apply_plan(plan, mixed.refits_under(plan, starts[index].refits))
        if self.width is not None and self.width.examples:
            self.refit_kv_only(trainer, module, self.width.examples)
        module.apply_policy(None if sent is None else KVRetentionPolicy.from_json(sent))

    def _policies(self, trainer: Trainer, module: PDTrimModule, context: ScoringContext, round: int) -> PolicyOf | None:
        """From a plan to the policy that meets the round's share of the wire; None where the wire is left alone."""
        share = self.share(round).wire_bytes
        if share == 1:
            return None
        measured = selection_context(
            context.student, context.teacher, calibration_batches(trainer), wire_shape(trainer, module), module.device,
            memory=self.memory, ranks=context.ranks, journal=journal_file(trainer),
        )  # fmt: skip
        return policies_within(share, measured, self.wire, self.request.prompt)

    def _starts(
        self, trainer: Trainer, context: ScoringContext, plan: StagePlan, round: int, cost: CostModel
    ) -> list[Narrowed]:
        """The plans that the search starts from: `plan`, or narrower ones with their refits."""
        if self.width is None:
            return [Narrowed(plan)]
        text, repair = refitting_batches(trainer, self.width.examples), self.width.examples > 0
        return mixed.starts(context, plan, self.width, cost, self.share(round), text, repair=repair, round=round)

    def _chosen(
        self,
        context: ScoringContext,
        starts: Sequence[Narrowed],
        round: int,
        merges: Sequence[Move],
        policies: PolicyOf | None,
        cost: CostModel,
    ) -> tuple[int, StagePlan, KVRetentionPolicy | None]:
        """The index of the best start, and the plan and the policy found from it."""
        target = self.share(round)
        searches = [
            JointSearch(
                context.evaluator, start.plan, target, cost, guards=self.guards, policy_of=policies, merges=merges,
                merging=self.merging,
            )
            for start in starts
        ]  # fmt: skip
        index, state, _ = mixed.least(searches, context.progress)
        search = searches[index]
        if self.annealing is None:
            state, energy = search.improved(state, context.progress)
        else:
            state, energy = anneal(search, state, self.annealing, context.progress)
        chosen = search.final(state, round, energy)
        log.info("KL %.4f at %s of the dense model.", energy, cost.shares(chosen.plan, chosen.policy))
        return index, chosen.plan, chosen.policy
