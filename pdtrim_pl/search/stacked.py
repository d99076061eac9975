"""Whether several narrowings of one run are possible together, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage, StagePlan
from pdtrim_pl.search.narrow import Narrowing


def check_together(plan: StagePlan, narrowings: Sequence[Narrowing]) -> dict[Stage, int]:
    """Refuse narrowings of one part that leave a block too little, one after the other.

    Which units leave is not known yet. Where it matters, stages are taken to lose the same ones.

    Args:
        plan: the plan before.
        narrowings: in the order of the run. Each is possible alone.

    Returns:
        Number of units that the widest block of each stage keeps.

    Raises:
        UserError: one of them finds too few units left.
    """
    widest = dict.fromkeys(STAGES, 0)
    for block in sorted({*plan.prefill, *plan.decode}):
        there = [stage for stage in STAGES if block in plan.blocks(stage)]
        kept = {stage: {*plan.kept_units(stage, block, narrowings[0].part)} for stage in there}
        for number, narrowing in enumerate(narrowings):
            here = narrowing.at(plan, block)
            if here is not None:
                _narrow(plan, block, kept, here, number)
        for stage in there:
            widest[stage] = max(widest[stage], len(kept[stage]))
    return widest


def _narrow(plan: StagePlan, block: int, kept: dict[Stage, set[int]], narrowing: Narrowing, number: int) -> None:
    """Take the units of one narrowing from `kept`: first those that cost no other stage anything."""
    part, groups = narrowing.part, plan.model.groups(narrowing.part)
    left = set.intersection(*(kept[stage] for stage in narrowing.stages))
    if len(left) < narrowing.count + groups:
        raise UserError(
            f"The `schedule`s of all WidthDrops together take more {part} than block {block} has: "
            f"{narrowing.count} cannot leave `{narrowing.target}` in their removal {number + 1}, where {len(left)} are "
            f"left and {groups} must stay. Lower one of them."
        )
    losing = [stage for stage in plan.stages_losing(narrowing.target, block) if stage in kept]
    others = set[int]().union(*(kept[stage] for stage in losing if stage not in narrowing.stages))
    size, gone = (plan.model.sizes[part] or 0) // groups, set[int]()
    for group in range(groups):
        members = sorted((unit for unit in left if unit // size == group), key=lambda unit: (unit in others, unit))
        gone |= {*members[: narrowing.count // groups]}
    for stage in losing:
        kept[stage] -= gone
