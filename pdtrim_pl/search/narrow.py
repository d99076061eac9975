"""Choose channels or query heads to remove from the blocks of a stage, and refit the layers that read them.

Every block of the stage loses the same number, so an export has one width. The layer that read the removed units is
refitted by least squares on the inputs that stay, so that its output at the tokens of its stage changes little.

A *unit* is an MLP channel or a query head. A *last layer* is the linear layer that reads the units of a block:
`down_proj` or `o_proj`.

Shapes: N tokens, H hidden, I inputs of a last layer, U units: channels, or heads of S = I / U inputs each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
from pdtrim_pl.merging.refit import held_back, refit
from pdtrim_pl.models.cuts import Cut
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import STAGES, Part, Stage, StagePlan, Target, Width
from pdtrim_pl.search.walk import Changes, Walk
from pdtrim_pl.staged.refit import Refit

Group = tuple[Stage, ...]
"""Stages that share the weights of a block and lose the same units of it."""


@dataclass(frozen=True)
class Narrowing:
    """What to remove from the blocks of a stage."""

    target: Target
    part: Part
    count: int
    """Number of channels or query heads to remove from every block."""
    criterion: WidthCriterion
    repair: bool = True
    """Refit last layers by least squares. A refit is used only if it reduces the error on held-back text."""
    tied: bool = False
    """Refit a layer only if all stages that use it lose the same units, so that no stage gets weights of its own."""
    round: int = 0
    """Round number, for the history."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the target."""
        return STAGES if self.target == "both" else (self.target,)

    def at(self, plan: StagePlan, block: int) -> Narrowing | None:
        """The narrowing of one block: in the stages of the target that run it. None if none of them does.

        A block that decode has dropped is thus narrowed in prefill alone, so that all blocks of prefill have one width.
        """
        running = [stage for stage in self.stages if block in plan.blocks(stage)]
        if not running:
            return None
        return self if len(running) == len(self.stages) else replace(self, target=running[0])


@dataclass(eq=False)
class Narrowed:
    """A plan, and the refitted layers that belong to it."""

    plan: StagePlan
    refits: list[Refit] = field(default_factory=list)

    def agreed(self, ranks: Parallel) -> Narrowed:
        """The result of rank 0, on every rank. Collective.

        Weights are not sent here: whoever writes a refit into the model sends the weights of rank 0. A rank without the
        refit gets zeros of the right shape instead.
        """
        own = {(refit.block, refit.stages, refit.layer): refit for refit in self.refits}
        agreed = ranks.agree([(r.block, r.stages, r.layer, tuple(r.weight.shape)) for r in self.refits])
        refits = [own.get((b, s, name)) or Refit(b, s, name, torch.zeros(shape)) for b, s, name, shape in agreed]
        return Narrowed(StagePlan.from_json(ranks.agree(self.plan.to_json())), refits)


def narrow(context: ScoringContext, start: StagePlan, narrowing: Narrowing, batches: Sequence[Batch]) -> Narrowed:
    """Choose the units that leave every block of the target, from the first block to the last.

    The blocks before it are already narrowed and refitted when a block is measured. Every rank measures the whole text.
    The student is not changed: apply the plan and the refits that are returned.

    Args:
        context: student and device.
        start: the plan before.
        narrowing: what to remove.
        batches: text to score and to refit on, the same on every rank. A quarter of it is held back to judge refits.

    Raises:
        UserError: a block would keep no unit, or the adapter of the model does not say where its blocks have units.
    """
    cut = check_units(context.student.architecture.cuts.get(narrowing.part), start, narrowing)
    effects: Effects = {}
    if narrowing.criterion.wants_gradients:
        effects = unit_effects(context, start, narrowing.part, batches)
    own: list[Narrowed] = []
    context.ranks.together(lambda: own.append(_narrowed(context, start, narrowing, batches, cut, effects)))
    return own[0].agreed(context.ranks)


def _narrowed(
    context: ScoringContext, start: StagePlan, narrowing: Narrowing, batches: Sequence[Batch], cut: Cut,
    effects: Effects,
) -> Narrowed:  # fmt: skip
    student, result = context.student, Narrowed(start)
    text = [batch.on(context.device) for batch in shared_steps(context.ranks, batches)]
    judging = held_back(len(text)) if narrowing.repair else 0
    blocks = sorted({*start.prefill, *start.decode})
    with eval_mode(student), torch.no_grad():
        walk = Walk(student, text)
        for done, block in enumerate(blocks):
            context.ranks.check_in()
            changes: Changes = {}
            here = narrowing.at(start, block)
            if here is not None:
                layer = _Layer(context, result.plan, here, block, cut, judging, effects)
                walk.run(block, result.plan, {}, cut.columns, layer.see)
                changes = layer.narrow(result)
            walk.advance(block, result.plan, changes)
            context.progress(f"narrowing block {block}, {done + 1} of {len(blocks)}")
    return result


def check_units(cut: Cut | None, plan: StagePlan, narrowing: Narrowing) -> Cut:
    """Refuse a narrowing that is not possible; return `cut` if it is.

    Args:
        cut: where the units are in a block; None if the adapter of the model does not say.
        plan: the plan before.
        narrowing: what to remove.

    Raises:
        UserError: the relation does not allow the target, the units cannot be removed one by one, or so many cannot be
            removed.
    """
    plan.check_target(narrowing.target)
    if cut is None or plan.model.sizes[narrowing.part] is None:
        raise UserError(
            f"`part: {narrowing.part}` cannot leave blocks of `model` one by one: its family ({plan.model.model_type}) "
            "names no layers for them (`cuts` of its Architecture). Drop whole blocks instead."
        )
    groups = plan.model.groups(narrowing.part)
    if narrowing.part == "heads" and groups == plan.model.heads:
        raise UserError(
            "No query head can leave blocks of `model`: each has a key/value head of its own, and all key/value heads "
            "stay. Use `part: channels`."
        )
    if narrowing.count % groups:
        raise UserError(
            f"{narrowing.count} query heads cannot leave: each of the {groups} key/value heads must lose equally many. "
            f"Give a multiple of {groups} in `schedule`."
        )
    for block in sorted({*plan.prefill, *plan.decode}):
        here = narrowing.at(plan, block)
        if here is not None and (there := len(_common(plan, here, block))) < here.count + groups:
            raise UserError(
                f"{here.count} {here.part} cannot leave block {block} in `{here.target}`: it has {there}, and must "
                f"keep {groups}. Lower the `schedule`."
            )
    return cut


class _Layer:
    """Collects the inputs of one block's last layer, chooses the units that leave, and refits the layer."""

    def __init__(
        self, context: ScoringContext, plan: StagePlan, narrowing: Narrowing, block: int, cut: Cut, held_back: int,
        effects: Effects,
    ) -> None:  # fmt: skip
        self.context, self.plan, self.narrowing, self.block, self.name = context, plan, narrowing, block, cut.columns
        self.held_back, self.effects = held_back, effects
        losing = plan.stages_losing(narrowing.target, block)
        together = len({(id(self._weights(stage)), plan.width(stage, block)) for stage in losing}) == 1
        self.groups: list[Group] = [tuple(losing)] if together else [(stage,) for stage in losing]
        self._fitted: dict[Group, Tensor] = {}
        self._judged: dict[Group, Tensor] = {}

    def see(self, index: int, stage: Stage, inputs: Tensor) -> None:
        """Add the layer's inputs at the real tokens of one batch in one stage, [N, I], to the Gram matrices."""
        for group in self.groups:
            if stage in group:
                sums = self._judged if index < self.held_back else self._fitted
                with torch.autocast(inputs.device.type, enabled=False):  # autocast would multiply in bf16
                    gram = (inputs.float().T @ inputs.float()).double()
                sums[group] = sums[group] + gram if group in sums else gram

    def narrow(self, result: Narrowed) -> Changes:
        """Add the narrower block and its refits to `result`; return the changes of its weights."""
        part, plan = self.narrowing.part, self.plan
        units = plan.model.sizes[part]
        assert units is not None
        if missing := [stage for group in self.groups if group not in self._fitted for stage in group]:
            raise UserError(
                f"No calibration token reaches {' and '.join(missing)}: every response has one token, which prefill "
                "predicts. Use longer responses (`lengths` of the data)."
            )
        if not all(bool(gram.isfinite().all()) for gram in [*self._fitted.values(), *self._judged.values()]):
            raise UserError(
                f"The inputs of {self.name} in block {self.block} are not all finite. Check the weights of `model`. If "
                "they or `trainer.precision` are float16, use bfloat16 or float32."
            )
        weights = {group: self._whole_weight(group[0]) for group in self.groups}
        seen = {group: self._seen(group, weights[group], units) for group in self.groups}
        gone = self._leaving([seen[g].only(plan.kept_units(g[0], self.block, part)) for g in self.groups])
        width = Width(**{part: tuple(unit for unit in range(units) if unit not in gone)})
        after, changes, untied, errors = plan.narrow(self.narrowing.target, self.block, width), {}, set[Stage](), [0.0]
        for group in self.groups:
            marks = [self._marked(p, group[0], seen[group]) for p in (plan, after)]
            shared = self._shared_with_others(group)
            judged = None if shared and self.narrowing.tied else self._judged.get(group)
            outcome = refit(weights[group], self._fitted[group], judged, *marks)
            errors.append(outcome.error)
            if outcome.change is not None:
                changes.update({stage: {self.name: outcome.change} for stage in group})
                result.refits.append(Refit(self.block, group, self.name, weights[group] + outcome.change))
                untied |= set(group) if shared else set()
        result.plan = plan.narrow(
            self.narrowing.target, self.block, width, untied=untied, round=self.narrowing.round,
            criterion=self.narrowing.criterion.name, score=max(errors),
        )  # fmt: skip
        return changes

    def _seen(self, group: Group, weight: Tensor, units: int) -> Seen:
        effects = [self.effects[s, self.block] for s in group if (s, self.block) in self.effects]
        first_order = torch.stack(effects).sum(0).to(weight.device) if effects else None
        if self.narrowing.criterion.wants_gradients and first_order is None:
            first_order = weight.new_zeros(units)  # no response token depends on it
        return Seen(weight, self._fitted[group], torch.arange(units, device=weight.device), first_order)

    def _leaving(self, seen: list[Seen]) -> set[int]:
        """The units that leave the target: those whose loss hurts least, summed over all stages that lose them."""
        narrowing, model = self.narrowing, self.plan.model
        named, losing = narrowing.stages, {stage for group in self.groups for stage in group}
        left, gone = _common(self.plan, narrowing, self.block), set[int]()
        # Units that only the target has leave first: to lose them costs no other stage anything.
        others = {u for s in losing - set(named) for u in self.plan.kept_units(s, self.block, narrowing.part)}
        groups = model.groups(narrowing.part)
        size, each = (model.sizes[narrowing.part] or 0) // groups, narrowing.count // groups
        rounds = min(narrowing.criterion.rounds, each)
        for turn in range(rounds):
            harm = dict.fromkeys(left, 0.0)
            for one in seen:
                for unit, value in zip(one.units.tolist(), narrowing.criterion.harm(one).tolist(), strict=True):
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
        """The inputs of the layer that a stage keeps under a plan, bool [I]."""
        kept = torch.zeros(len(seen.units), dtype=torch.bool, device=seen.units.device)
        kept[list(plan.kept_units(stage, self.block, self.narrowing.part))] = True
        return kept.repeat_interleave(seen.size)

    def _weights(self, stage: Stage) -> nn.Module:
        return self.context.student.gates[self.block].weights(stage, self.context.student.plan)

    def _shared_with_others(self, group: Group) -> bool:
        users = [s for s in STAGES if s not in group and self.block in self.plan.blocks(s)]
        return any(self._weights(stage) is self._weights(group[0]) for stage in users)

    def _whole_weight(self, stage: Stage) -> Tensor:
        """The layer's weights in fp32, whole on every rank. With sharded weights this is a collective."""
        weight = self._weights(stage).get_submodule(self.name).get_parameter("weight")
        with self.context.ranks.whole_weights([weight]):
            found = weight.detach()
            return (found.full_tensor() if isinstance(found, DTensor) else found).float().clone()


def _common(plan: StagePlan, narrowing: Narrowing, block: int) -> set[int]:
    """The units that a block still has in every stage of the target."""
    return set.intersection(*({*plan.kept_units(stage, block, narrowing.part)} for stage in narrowing.stages))
