"""How many channels or query heads must leave every block of a stage, so that a request meets a target of costs."""

from __future__ import annotations

from dataclasses import replace

from pdtrim_pl.plan import Part, Stage, StagePlan
from pdtrim_pl.sizing.cost import CostModel, Costs, CostTarget


def units_to_meet(cost: CostModel, plan: StagePlan, stage: Stage, part: Part, target: CostTarget) -> int:
    """The least number of units that must leave every block of a stage, if no block leaves it.

    Args:
        cost: the cost model.
        plan: the plan before.
        stage: the stage. Its own cost counts: FLOPs of prefill, or bytes that a decode step reads.
        part: channels or query heads. Every key/value head loses the same number of query heads.
        target: the costs to meet.

    Returns:
        The number; if even the largest possible number does not meet the target, that number.
    """
    each = plan.model.groups(part)
    left = min(len(plan.kept_units(stage, block, part)) for block in plan.blocks(stage))
    least, most = 0, left // each - 1
    while least < most:
        tried = (least + most) // 2
        if _met(cost, without(plan, stage, part, tried * each), stage, target):
            most = tried
        else:
            least = tried + 1
    return least * each


def without(plan: StagePlan, stage: Stage, part: Part, count: int) -> StagePlan:
    """The plan after any `count` units have left every block of a stage. For costs: which units leave does not matter.

    Query heads leave every key/value head in turn.
    """
    widths, groups = dict(plan.widths[stage]), plan.model.groups(part)
    for block in plan.blocks(stage):
        kept = plan.kept_units(stage, block, part)
        size = len(kept) // groups
        left = [kept[g * size : (g + 1) * size - count // groups] for g in range(groups)]
        widths[block] = replace(plan.width(stage, block), **{part: tuple(unit for group in left for unit in group)})
    return replace(plan, relation="free", widths={**plan.widths, stage: widths})


def _met(cost: CostModel, plan: StagePlan, stage: Stage, target: CostTarget) -> bool:
    costs = cost.shares(plan)
    if stage == "prefill":
        return CostTarget(prefill_flops=target.prefill_flops).met(Costs(costs.prefill_flops, 0.0, 0.0))
    return CostTarget(decode_bytes=target.decode_bytes).met(Costs(0.0, costs.decode_bytes, 0.0))
