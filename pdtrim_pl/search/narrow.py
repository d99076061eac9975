"""Which channels or query heads leave the blocks of a stage, block by block, and what is refitted in their stead.

Every block of the stage loses equally many, so that an export has one width. The last layer behind them is refitted by
least squares on what is left: its output at the stage's own tokens is to be as before.

Shapes: H hidden, I inputs of a last layer, U units: channels, or heads of S = I / U inputs each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.criteria.unit_effects import Effects, unit_effects
from pdtrim_pl.criteria.width import Seen, WidthCriterion
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_steps
from pdtrim_pl.merging.refit import refit
from pdtrim_pl.models.cuts import Cut
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import STAGES, Part, Stage, StagePlan, Target, Width
from pdtrim_pl.search.walk import Changes, Walk
from pdtrim_pl.staged.refit import Refit

Group = tuple[Stage, ...]
"""Stages that lose the same units of a block and share its weights."""


@dataclass(frozen=True)
class Narrowing:
    """What is to leave the blocks of a stage."""

    target: Target
    part: Part
    count: int
    """So many channels or query heads of every block."""
    criterion: WidthCriterion
    repair: bool = True
    """Refit last layers by least squares, where held-back text agrees."""
    tied: bool = False
    """Refit only layers that all their stages lose the same of, so that no block gets weights of its own."""
    round: int = 0
    """Of the history."""


@dataclass(eq=False)
class Narrowed:
    """The plan so far, and the refits that go with it."""

    plan: StagePlan
    refits: list[Refit] = field(default_factory=list)

    def agreed(self, ranks: Parallel) -> Narrowed:
        """Rank 0's on every rank, but for the new weights, which are handed out when they are written. Collective."""
        own = {(refit.block, refit.stages): refit for refit in self.refits}
        told = ranks.agree([(r.block, r.stages, r.layer, tuple(r.weight.shape)) for r in self.refits])
        refits = [own.get((b, s)) or Refit(b, s, layer, torch.zeros(shape)) for b, s, layer, shape in told]
        return Narrowed(StagePlan.from_json(ranks.agree(self.plan.to_json())), refits)


def narrow(context: ScoringContext, start: StagePlan, asked: Narrowing, batches: Sequence[Batch]) -> Narrowed:
    """Choose what leaves every block of the target, first block first; each sees what the ones before it have become.

    Every rank sees the whole text. The student stays as it is.

    Args:
        context: student and device.
        start: the plan before.
        asked: what is to leave.
        batches: text to score and to refit on, the same on every rank. A quarter of it is held back to judge refits.

    Raises:
        UserError: a block would be left without a unit, or the family's blocks have no such units.
    """
    cut = check_units(context.student.architecture.cuts.get(asked.part), start, asked)
    effects: Effects = {}
    if asked.criterion.wants_gradients:
        effects = unit_effects(context, start, asked.part, batches)
    mine: list[Narrowed] = []
    context.ranks.together(lambda: mine.append(_narrowed(context, start, asked, batches, cut, effects)))
    return mine[0].agreed(context.ranks)


def _narrowed(
    context: ScoringContext, start: StagePlan, asked: Narrowing, batches: Sequence[Batch], cut: Cut, effects: Effects
) -> Narrowed:
    student, found = context.student, Narrowed(start)
    text = [batch.on(context.device) for batch in shared_steps(context.ranks, batches)]
    held = (len(text) // 4 or min(1, len(text) - 1)) if asked.repair else 0
    blocks = sorted({*start.prefill, *start.decode})
    with eval_mode(student), torch.no_grad():
        walk = Walk(student, text)
        for done, block in enumerate(blocks):
            context.ranks.check_in()
            changes: Changes = {}
            if all(block in start.blocks(stage) for stage in _named(asked.target)):
                layer = _Layer(context, found.plan, asked, block, cut, held, effects)
                walk.run(block, found.plan, {}, cut.columns, layer.see)
                changes = layer.narrow(found)
            walk.advance(block, found.plan, changes)
            context.progress(f"narrowing block {block}, {done + 1} of {len(blocks)}")
    return found


def check_units(cut: Cut | None, plan: StagePlan, asked: Narrowing) -> Cut:
    """Refuse what cannot leave.

    Args:
        cut: where the units are, if the model's family says so.
        plan: the plan before.
        asked: what is to leave.

    Raises:
        UserError: with the way out.
    """
    if cut is None or plan.model.sizes[asked.part] is None:
        raise UserError(
            f"`part: {asked.part}` cannot leave blocks of `model` one by one: its family ({plan.model.model_type}) has "
            "no layers for that (`cuts` of its Architecture). Drop whole blocks instead."
        )
    groups = (plan.model.kv_heads or 1) if asked.part == "heads" else 1
    if asked.part == "heads" and groups == plan.model.heads:
        raise UserError(
            "No query head can leave blocks of `model`: each has a key/value head of its own, and all key/value heads "
            "stay. Use `part: channels`."
        )
    if asked.count % groups:
        raise UserError(
            f"{asked.count} query heads cannot leave: each of the {groups} key/value heads must lose equally many. "
            f"Give a multiple of {groups} in `schedule`."
        )
    for block in sorted({*plan.prefill, *plan.decode}):
        if not all(block in plan.blocks(stage) for stage in _named(asked.target)):
            continue
        if (there := len(_common(plan, asked, block))) < asked.count + groups:
            raise UserError(
                f"{asked.count} {asked.part} cannot leave block {block} in `{asked.target}`: it has {there}, and must "
                f"keep {groups}. Lower the `schedule`."
            )
    return cut


class _Layer:
    """The last layer behind the units of one block: what it sees, which units leave, what its weights become."""

    def __init__(
        self, context: ScoringContext, plan: StagePlan, asked: Narrowing, block: int, cut: Cut, held: int,
        effects: Effects,
    ) -> None:  # fmt: skip
        self.context, self.plan, self.asked, self.block, self.name = context, plan, asked, block, cut.columns
        self.held, self.effects = held, effects
        losing = plan.stages_losing(asked.target, block)
        together = len({(id(self._weights(stage)), plan.width(stage, block)) for stage in losing}) == 1
        self.groups: list[Group] = [tuple(losing)] if together else [(stage,) for stage in losing]
        self._fitted: dict[Group, Tensor] = {}
        self._judged: dict[Group, Tensor] = {}

    def see(self, index: int, stage: Stage, inputs: Tensor) -> None:
        """Take in the layer's inputs at the real tokens of one batch in a stage, [N, I]."""
        for group in self.groups:
            if stage in group:
                sums = self._judged if index < self.held else self._fitted
                with torch.autocast(inputs.device.type, enabled=False):  # whose products would be in bf16
                    gram = (inputs.float().T @ inputs.float()).double()
                sums[group] = sums[group] + gram if group in sums else gram

    def narrow(self, found: Narrowed) -> Changes:
        """Narrow the block in `found`; returns what its weights change by."""
        part, plan = self.asked.part, self.plan
        units = plan.model.sizes[part]
        assert units is not None
        if missing := [stage for group in self.groups if group not in self._fitted for stage in group]:
            raise UserError(
                f"No calibration token reaches {' and '.join(missing)}: every response has one token, which prefill "
                "predicts. Use longer responses (`lengths` of the data)."
            )
        weights = {group: self._whole_weight(group[0]) for group in self.groups}
        seen = {group: self._seen(group, weights[group], units) for group in self.groups}
        gone = self._leaving([seen[g].only(_kept(plan, g[0], self.block, part)) for g in self.groups])
        width = Width(**{part: tuple(unit for unit in range(units) if unit not in gone)})
        after, changes, untied, errors = plan.narrow(self.asked.target, self.block, width), {}, set[Stage](), [0.0]
        for group in self.groups:
            marks = [self._marked(p, group[0], seen[group]) for p in (plan, after)]
            shared = self._shared_with_others(group)
            judged = None if shared and self.asked.tied else self._judged.get(group)
            outcome = refit(weights[group], self._fitted[group], judged, *marks)
            errors.append(outcome.error)
            if outcome.change is not None:
                changes.update({stage: {self.name: outcome.change} for stage in group})
                found.refits.append(Refit(self.block, group, self.name, weights[group] + outcome.change))
                untied |= set(group) if shared else set()
        found.plan = plan.narrow(
            self.asked.target, self.block, width, untied=untied, round=self.asked.round,
            criterion=self.asked.criterion.name, score=max(errors),
        )  # fmt: skip
        return changes

    def _seen(self, group: Group, weight: Tensor, units: int) -> Seen:
        effects = [self.effects[s, self.block] for s in group if (s, self.block) in self.effects]
        first_order = torch.stack(effects).sum(0).to(weight.device) if effects else None
        if self.asked.criterion.wants_gradients and first_order is None:
            first_order = weight.new_zeros(units)  # no response token depends on it
        return Seen(weight, self._fitted[group], torch.arange(units, device=weight.device), first_order)

    def _leaving(self, seen: list[Seen]) -> set[int]:
        """The units that leave the target, by the harm to every stage that loses them."""
        asked, model = self.asked, self.plan.model
        named, losing = _named(asked.target), {stage for group in self.groups for stage in group}
        left, gone = _common(self.plan, asked, self.block), set[int]()
        # What another stage would lose too leaves last.
        others = {u for s in losing - set(named) for u in _kept(self.plan, s, self.block, asked.part)}
        groups = (model.kv_heads or 1) if asked.part == "heads" else 1
        size, each = (model.sizes[asked.part] or 0) // groups, asked.count // groups
        rounds = min(asked.criterion.rounds, each)
        for turn in range(rounds):
            harm = dict.fromkeys(left, 0.0)
            for one in seen:
                for unit, value in zip(one.units.tolist(), asked.criterion.harm(one).tolist(), strict=True):
                    if unit in harm:
                        harm[unit] += value
            leaving = each * (turn + 1) // rounds - each * turn // rounds
            for group in range(groups):
                members = sorted((u for u in left if u // size == group), key=lambda u: (u in others, harm[u], u))
                gone |= set(members[:leaving])
            left -= gone
            if turn + 1 < rounds:
                seen = [one.refitted(set(one.units.tolist()) - gone) for one in seen]
        return gone

    def _marked(self, plan: StagePlan, stage: Stage, seen: Seen) -> Tensor:
        """The inputs that a stage keeps under a plan, bool [I]."""
        kept = torch.zeros(len(seen.units), dtype=torch.bool, device=seen.units.device)
        kept[list(_kept(plan, stage, self.block, self.asked.part))] = True
        return kept.repeat_interleave(seen.size)

    def _weights(self, stage: Stage) -> nn.Module:
        return self.context.student.gates[self.block].weights(stage, self.context.student.plan)

    def _shared_with_others(self, group: Group) -> bool:
        users = [s for s in STAGES if s not in group and self.block in self.plan.blocks(s)]
        return any(self._weights(stage) is self._weights(group[0]) for stage in users)

    def _whole_weight(self, stage: Stage) -> Tensor:
        """The layer's weights, fp32, whole on every rank."""
        weight = self._weights(stage).get_submodule(self.name).get_parameter("weight")
        with self.context.ranks.whole_weights([weight]):
            found = weight.detach()
            return (found.full_tensor() if isinstance(found, DTensor) else found).float().clone()


def _named(target: Target) -> tuple[Stage, ...]:
    return STAGES if target == "both" else (target,)


def _common(plan: StagePlan, asked: Narrowing, block: int) -> set[int]:
    """The units that a block has in every stage of the target."""
    return set.intersection(*({*_kept(plan, stage, block, asked.part)} for stage in _named(asked.target)))


def _kept(plan: StagePlan, stage: Stage, block: int, part: Part) -> tuple[int, ...]:
    """The units that a block has in a stage."""
    kept = plan.width(stage, block).kept(part)
    return tuple(range(plan.model.sizes[part] or 0)) if kept is None else kept
