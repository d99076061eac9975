"""Plans that the benchmarks take from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdtrim_pl.plan import StagePlan


def without(plan: StagePlan, drops: Sequence[str]) -> StagePlan:
    """The plan without some blocks; a drop is `stage:block,block`, with `both` for both stages."""
    for drop in drops:
        target: Any
        target, blocks = drop.split(":")
        for block in blocks.split(","):
            plan = plan.drop(target, int(block))
    return plan
