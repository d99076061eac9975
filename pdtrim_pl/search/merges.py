"""The distillation set: neighbours that one fitted block can stand for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.merging import FittedRun, Merging, fit_runs
from pdtrim_pl.moves import Move
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.search.guards import Guards

log = logging.getLogger(__name__)


def distillation_set(
    context: ScoringContext, start: StagePlan, target: Target, settings: Merging, guards: Guards,
    batches: Sequence[Batch] | None = None,
) -> list[Move]:  # fmt: skip
    """Fit every pair of neighbours of a target and offer those that reach the bar to the plans that name them.

    Asked for before the context's evaluator, whose journal then knows the fitted weights. The offers end when the
    student's plan is applied.

    Args:
        context: student, teacher and calibration set; its student runs under `start`.
        start: the plan whose neighbours may be merged.
        target: the stage(s) to merge in.
        settings: of the fit.
        guards: blocks that no merge may touch.
        batches: text to fit on, the same on every rank; the calibration set by default, on which merges then look
            better than they are.

    Returns:
        The merges that may be chosen, in order of their blocks.
    """
    pairs = neighbours(start, target, settings, guards)
    fitted = fit_runs(
        context.student, context.teacher, batches or context.batches, target, pairs, settings,
        device=context.device, gather=context.ranks.gather_weights, progress=context.progress,
        leave_if_asked=context.ranks.leave_if_asked,
    )  # fmt: skip
    accepted = _agreed(context, list(fitted.accepted))
    context.student.offer(accepted)
    log.info(
        "%d of %d pairs of %s reach a cosine of %g; fitting them took %.0f s and %d tokens.",
        len(accepted), len(pairs), target, settings.min_cosine, fitted.seconds, fitted.tokens,
    )  # fmt: skip
    return [run.move for run in accepted]


def neighbours(
    plan: StagePlan, target: Target, settings: Merging, guards: Guards, length: int = 2
) -> list[tuple[int, ...]]:
    """Runs of so many blocks next to each other in a target that may be merged there, into any of them."""
    allowed = set(plan.candidates(target, guards.protect_first, guards.protect_last))
    blocks = plan.blocks("decode" if target == "decode" else "prefill")
    runs = [blocks[first : first + length] for first in range(len(blocks) - length + 1)]
    runs = [run for run in runs if allowed.issuperset(run)]
    return [run for run in runs if all(settings.allows(plan, Move(target, run, into)) for into in run)]


def _agreed(context: ScoringContext, accepted: list[FittedRun]) -> list[FittedRun]:
    """Rank 0's fits on every rank: rounding may part both their weights and who reaches the bar."""
    if context.ranks.size == 1:
        return accepted
    for run in accepted:
        for block in run.blocks.values():
            block.cpu()
    agreed: list[FittedRun] = context.ranks.agree(accepted)
    for run in agreed:
        for block in run.blocks.values():
            block.to(context.device)
    return agreed
