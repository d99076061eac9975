"""Depth and width in one joint search: narrower blocks, fewer blocks, or a mix of both, to meet one target of costs.

An export has one width for each stage, so there are few widths to try. Each stage has its own: decode may become
narrower while prefill loses blocks. For each pair of widths the joint search removes as many blocks as the target still
needs. The mix of least energy wins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.criteria.width import ActivationTimesWeight, WidthCriterion
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Part, Stage, StagePlan, Target
from pdtrim_pl.search.joint import JointSearch, JointState
from pdtrim_pl.search.narrow import Narrowed, Narrowing, narrow
from pdtrim_pl.search.width_levels import units_to_meet
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.staged.refit import Refit

log = logging.getLogger(__name__)
Choice = tuple[tuple[Target, int], ...]
"""Targets, and how many channels or heads leave each of them."""


@dataclass(frozen=True)
class WidthMoves:
    """The widths that a joint search tries beside removals of blocks.

    Raises:
        UserError: a share out of range, or too few examples.
    """

    part: Part = "channels"
    """MLP channels or query heads."""
    shares: tuple[float, ...] = (0.0, 1.0)
    """Widths to try for each stage, as shares of the channels or heads that must leave it if no block leaves: 0 removes
    blocks only, 1 removes no block. All pairs of widths are tried."""
    criterion: WidthCriterion = field(default_factory=ActivationTimesWeight)
    """Measures how much it hurts to remove a channel or head."""
    examples: int = 128
    """Number of training examples to score and to refit layers on; 0 refits nothing and scores on the calibration
    set."""
    shared: bool = True
    """If both stages become narrower, both lose the same channels or heads: as many as the stage that must lose more.
    So the blocks keep one set of weights. Otherwise each stage loses its own. A stage that becomes narrower alone gets
    weights of its own where a refit helps."""

    def __post_init__(self) -> None:
        if not self.shares or not all(0.0 <= share <= 1.0 for share in self.shares):
            raise UserError(f"`width.shares` is {list(self.shares)}: give shares in [0, 1], at least one.")
        if self.examples < 0:
            raise UserError(f"`width.examples` is {self.examples}: give a number of examples, or 0.")


def starts(
    context: ScoringContext, plan: StagePlan, moves: WidthMoves, cost: CostModel, target: CostTarget,
    text: Sequence[Batch], *, repair: bool, round: int = 0,
) -> list[Narrowed]:  # fmt: skip
    """Make the blocks narrower in every way that is to be tried, and offer the refitted layers to the student.

    Call this before `context.evaluator` is created, because its journal is keyed by the offered weights too.

    Args:
        context: student and calibration set. The student runs under `plan`.
        plan: the plan before.
        moves: the widths to try.
        cost: the cost model.
        target: the costs to meet.
        text: text to score and to refit on, the same on every rank.
        repair: whether to refit layers on it.
        round: round number, for the history.

    Returns:
        One plan for each pair of widths, with its refits. The same on every rank.
    """
    needed = {stage: units_to_meet(cost, plan, stage, moves.part, target) for stage in STAGES}
    choices = _choices(plan, moves, needed)
    alone = {
        one: _narrowed(context, plan, moves, *one, text, repair, round)
        for one in dict.fromkeys(one for choice in choices for one in choice)
    }
    for result in alone.values():
        context.student.offer_refits(result.plan, result.refits)
    return [_together(plan, [alone[one] for one in choice]) for choice in choices]


def least(
    searches: Sequence[JointSearch], progress: Callable[[str], None] = lambda line: None
) -> tuple[int, JointState, float]:
    """Run the greedy search from every start, and return the index of the best, its state and its energy.

    Raises:
        UserError: the target can be reached from none.
    """
    found: list[tuple[float, int, JointState]] = []
    refused: UserError | None = None
    for index, search in enumerate(searches):
        try:
            state, energy = search.greedy(progress)
        except UserError as error:
            refused = error
            continue
        log.info("KL %.4f with %s and %d removals.", energy, _described(search.start), len(state.removals))
        found.append((energy, index, state))
    if not found:
        assert refused is not None
        raise refused
    energy, index, state = min(found, key=lambda one: one[:2])
    return index, state, energy


def refits_under(plan: StagePlan, refits: Sequence[Refit]) -> list[Refit]:
    """The refits that a plan still needs: of blocks that a stage runs, and that no merge has replaced."""
    needed = []
    for refit in refits:
        stages = tuple(s for s in refit.stages if refit.block in plan.blocks(s) and refit.block not in plan.merged[s])
        if stages:
            needed.append(replace(refit, stages=stages))
    return needed


def _choices(plan: StagePlan, moves: WidthMoves, needed: Mapping[Stage, int]) -> list[Choice]:
    """How many units leave which targets, without repetition."""
    each = plan.model.groups(moves.part)
    found: dict[Choice, None] = {}
    for shares in product(moves.shares, repeat=len(STAGES)):
        pairs = zip(STAGES, shares, strict=True)
        counts = {stage: round(share * needed[stage] / each) * each for stage, share in pairs}
        if not moves.shared or not all(counts.values()):
            found[tuple((stage, count) for stage, count in counts.items() if count)] = None
        elif len(set(shares)) == 1:
            found[("both", max(counts.values())),] = None
    return list(found)


def _narrowed(
    context: ScoringContext, plan: StagePlan, moves: WidthMoves, target: Target, count: int, text: Sequence[Batch],
    repair: bool, round: int,
) -> Narrowed:  # fmt: skip
    narrowing = Narrowing(target, moves.part, count, moves.criterion, repair, round=round)
    found = narrow(context, plan, narrowing, text)
    return replace(found, refits=[_of_first_rank(context, refit) for refit in found.refits])


def _together(plan: StagePlan, alone: Sequence[Narrowed]) -> Narrowed:
    """The results of narrowing each stage alone in one plan. The stages do not affect each other's choice."""
    result = Narrowed(plan)
    for one in alone:
        result.plan = one.plan if result.plan is plan else _joined(result.plan, one.plan)
        result.refits += one.refits
    return result


def _joined(prefill: StagePlan, decode: StagePlan) -> StagePlan:
    """A plan with the widths of prefill from one plan and those of decode from another with the same blocks."""
    return replace(
        prefill,
        widths={"prefill": prefill.widths["prefill"], "decode": decode.widths["decode"]},
        untied={"prefill": prefill.untied["prefill"], "decode": decode.untied["decode"]},
        history=prefill.history + tuple(entry for entry in decode.history if entry not in prefill.history),
    )


def _of_first_rank(context: ScoringContext, refit: Refit) -> Refit:
    """The refit with the weights of rank 0. Collective."""
    weight = refit.weight.to(context.device).contiguous()
    context.ranks.hand_out(weight, 0)
    return replace(refit, weight=weight)


def _described(plan: StagePlan) -> str:
    sizes = [f"{count} {part} in {stage}" for stage in STAGES for part, count in plan.widest(stage).items()]
    return " and ".join(sizes) or "whole blocks"
