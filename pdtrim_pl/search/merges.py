"""The distillation set: runs of neighbouring blocks that one fitted block can replace."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.merging import FittedRun, Merging, exchanged, fit_runs, share_of
from pdtrim_pl.plan import Move, StagePlan, Target
from pdtrim_pl.search.guards import Guards

log = logging.getLogger(__name__)


def distillation_set(
    context: ScoringContext, start: StagePlan, target: Target, settings: Merging, guards: Guards,
    batches: Sequence[Batch] | None = None,
) -> list[Move]:  # fmt: skip
    """Fit one block to every pair of neighbours in a target, and offer those with a sufficient cosine to the student.

    Call this before `context.evaluator` is created: its journal is keyed by the offered weights too. The offers end
    when a plan is applied to the student.

    Args:
        context: student, teacher and calibration set. The student runs under `start`.
        start: the plan whose neighbours may be merged.
        target: the stage(s) to merge in.
        settings: settings of the fits.
        guards: blocks that no merge may include.
        batches: text to fit on, the same on every rank. By default this is the calibration set; energies measured on it
            are then too low.

    Returns:
        The merges that a search may choose, in the order of their blocks.

    Raises:
        UserError: see `fit_runs`.
    """
    pairs = neighbours(start, target, settings, guards)
    accepted = _accepted(_fitted(context, target, pairs, settings, batches or context.batches))
    context.student.offer(accepted)
    log.info("%d of %d pairs of %s reach a cosine of %g.", len(accepted), len(pairs), target, settings.min_cosine)
    return [run.move for run in accepted]


def replace_span(
    context: ScoringContext, start: StagePlan, count: int, settings: Merging, guards: Guards, batches: Sequence[Batch],
    screening_steps: int, trailing_blocks: int = 0,
) -> StagePlan:  # fmt: skip
    """Replace `count + 1` neighbouring blocks (a span) of both stages by one fitted block.

    Screening: one block is fitted briefly to every span, and the span with the least KL is chosen. A long fit follows
    for this span. The fitted weights are offered to the student, and the returned plan uses them. Call this before
    `context.evaluator` is created, as with `distillation_set`.

    Args:
        context: student, teacher and calibration set. The student runs under `start`.
        start: the plan before the merge.
        count: number of blocks to remove.
        settings: settings of the long fit.
        guards: blocks that no merge may include.
        batches: text to fit on, the same on every rank.
        screening_steps: optimizer steps of each brief fit.
        trailing_blocks: number of blocks after the span that learn with it; see `fit_runs`.

    Raises:
        UserError: there are no neighbours to merge, or the long fit does not reach `min_cosine`.
    """
    spans = neighbours(start, "both", settings, guards, count + 1)
    if not spans:
        raise UserError(f"No {count + 1} neighbours of {start.prefill} can be merged in both stages within {guards}.")
    brief = replace(settings, steps=screening_steps, min_cosine=-1.0)
    few = batches[: brief.batches(len(batches[0].prompt_ids))]
    fits = _accepted(_fitted(context, "both", spans, brief, few))
    best, energy = least_kl(context, start, fits)
    span = fits[best].move.run
    log.info("Blocks %d to %d: KL %.4f after a brief fit, the least of %d.", span[0], span[-1], energy, len(spans))
    (run,) = _fitted(context, "both", [span], settings, batches, trailing_blocks)
    if run.weights is None:
        raise UserError(
            f"The block fitted to {list(span)} reaches a cosine of {run.cosine:.3f}, and `merging.min_cosine` is "
            f"{settings.min_cosine}. Remove fewer blocks, fit for more `steps`, or lower it."
        )
    context.student.offer([run])
    return settings.apply(start, run.move, criterion="fitted_kl", score=energy)


def least_kl(context: ScoringContext, start: StagePlan, fitted: Sequence[FittedRun]) -> tuple[int, float]:
    """The index of the merge with the least KL to the teacher on the calibration set, and this KL in nats."""
    context.student.offer(fitted)
    with torch.no_grad():
        found = context.evaluator.best([Candidate(run.move.apply(start, untied=False)) for run in fitted])
    context.student.withdraw()
    return found


def neighbours(
    plan: StagePlan, target: Target, settings: Merging, guards: Guards, length: int = 2
) -> list[tuple[int, ...]]:
    """Runs of `length` neighbouring blocks of a target that may be merged there, into any block of the run."""
    allowed = set(plan.candidates(target, guards.protect_first, guards.protect_last))
    blocks = plan.blocks("decode" if target == "decode" else "prefill")
    runs = [blocks[first : first + length] for first in range(len(blocks) - length + 1)]
    runs = [run for run in runs if allowed.issuperset(run)]
    return [run for run in runs if all(settings.allows(plan, Move(target, run, into)) for into in run)]


def _fitted(
    context: ScoringContext, target: Target, runs: Sequence[tuple[int, ...]], settings: Merging,
    batches: Sequence[Batch], trailing_blocks: int = 0,
) -> list[FittedRun]:  # fmt: skip
    """Fit all runs, split among the ranks. Every rank gets all results."""
    ranks = context.ranks

    def fit_share() -> list[FittedRun]:
        fitted = fit_runs(
            context.student, context.teacher, batches, target, share_of(ranks, runs), settings, device=context.device,
            gather=None if ranks.whole else ranks.whole_weights, progress=context.progress,
            leave_if_asked=ranks.check_in, trailing_blocks=trailing_blocks,
        )  # fmt: skip
        log.info("Fitting %d run(s) took %.0f s and %d tokens.", len(fitted.runs), fitted.seconds, fitted.tokens)
        return list(fitted.runs)

    mine: list[FittedRun] = []
    ranks.together(lambda: mine.extend(fit_share()))
    return exchanged(context.student, mine, len(runs), ranks)


def _accepted(runs: Sequence[FittedRun]) -> list[FittedRun]:
    return [run for run in runs if run.weights is not None]
