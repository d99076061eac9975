"""The local fit: one block learns to do what a run of neighbours does, for many runs at once.

Source: LLM-Streamline (arXiv 2403.19135) replaces a span of blocks by one that is trained on the span's input and
output; here from recorded hidden states of the teacher, per stage, under the contract of one request. Ours: the recipe.

Shapes: N real tokens of the stages that merge, H hidden.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.merging.least_squares import PASSES, solve_last_projection
from pdtrim_pl.merging.recording import Recording, record
from pdtrim_pl.merging.settings import Merging, merging_stages
from pdtrim_pl.merging.trial import Start, Trial
from pdtrim_pl.parallel import Gather
from pdtrim_pl.plan import STAGES, Move, StagePlan, Target
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.fitted_run import FittedRun

_SMALLEST = 0.01
"""Weights that start at zero, such as biases, learn as if they were of this size."""


@dataclass(frozen=True)
class FittedRuns:
    """The outcome of the fits, and what they cost."""

    runs: tuple[FittedRun, ...]
    """One for every run asked for, in that order."""
    tokens: int
    """Positions trained on, summed over steps and fitted blocks."""
    block_tokens: int
    """One for every token and block that ran forward; a backward pass counts as two more."""
    seconds: float

    @property
    def accepted(self) -> tuple[FittedRun, ...]:
        """The distillation set: those that reached the bar."""
        return tuple(run for run in self.runs if run.weights is not None)


@dataclass
class _Cost:
    tokens: int = 0
    block_tokens: int = 0


@dataclass(eq=False)
class _Fit:
    """One block in training."""

    trial: Trial
    batches: Sequence[Recording]
    """What it sees, step by step."""
    scale: float
    """Mean square of what the run adds to its input: makes losses of different runs comparable."""
    plain_cosine: float

    @classmethod
    def of(cls, trial: Trial, training: Sequence[Recording], judging: Sequence[Recording], settings: Merging) -> _Fit:
        usable = [recording for recording in training if trial.tokens(recording)]
        judged = [recording for recording in judging if trial.tokens(recording)]
        if not usable or not judged:
            raise UserError(
                f"There is no {' or '.join(trial.start.stands_for)} token to fit merged blocks on: responses of one "
                "token give decode none. Use longer responses (`lengths` of the data), or merge in the other stage."
            )
        squares = [trial.change(recording).double().square().mean() for recording in usable]
        scale = max(float(torch.stack(squares).mean()), 1e-12)
        draw, order = random.Random(settings.seed), list[Recording]()
        while len(order) < settings.steps:
            order += draw.sample(usable, len(usable))
        return cls(trial, order[: settings.steps], scale, trial.judge(judged)[0])


def fit_runs(
    student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], target: Target,
    runs: Sequence[tuple[int, ...]], settings: Merging, *, device: torch.device | str = "cpu",
    gather: Gather | None = None, progress: Callable[[str], None] = lambda line: None,
    leave_if_asked: Callable[[], None] = lambda: None, trailing_blocks: int = 0,
) -> FittedRuns:  # fmt: skip
    """Fit one block to each run of neighbours of the student's plan: from the first, from the last; the better is kept.

    The teacher runs once for all runs. A fitted block does not depend on which other runs are fitted with it. Of the
    batches, cut to the size of a step, some are held back to judge on (`Merging.held_back`). Neither model is changed,
    nor any random generator.

    Args:
        student: gives the weights to start from, plan and policy.
        teacher: gives the hidden states to fit to, under its full plan.
        batches: the calibration set.
        target: the stage(s) to merge in; under `nested`, a merge in prefill of blocks that decode runs is one in both.
        runs: original indices of neighbours in those stages.
        settings: steps, learning rate, bar.
        device: where both models are.
        gather: from the strategy, where it shards weights; every rank then fits the same runs on the same batches.
        progress: told how far it is.
        leave_if_asked: called before every `pairs_at_once` runs; raises where the process has to leave the machine.
        trailing_blocks: so many blocks after a run learn with it, towards the teacher's state after them: they make
            good what one block alone cannot. Both stages must run and merge all of them alike.

    Raises:
        UserError: blocks that are not neighbours, or cannot be merged `tied`; a teacher of other blocks; no token of
            the stage(s) to fit on.
    """
    started, cost = time.monotonic(), _Cost()
    _check_teacher(student, teacher)
    asked = [_starts(student, target, run, settings, trailing_blocks) for run in runs]
    batches = [part for batch in batches for part in batch.cut(settings.batch_size)]
    held = settings.held_back(len(batches), len(batches[0].prompt_ids))
    fitted: list[FittedRun] = []
    with eval_mode(student), eval_mode(teacher):
        for part in _parts(asked, teacher, batches, settings):
            places = {place for starts in part for start in starts for place in start.places}
            recordings = [record(teacher, batch.on(device), student.plan.boundary, places) for batch in batches]
            cost.block_tokens += sum(r.tokens(s) for r in recordings for s in r.hidden) * teacher.plan.model.num_blocks
            training, judging = recordings[held:], recordings[:held] or recordings
            for first in range(0, len(part), settings.pairs_at_once):
                leave_if_asked()
                group = part[first : first + settings.pairs_at_once]
                fitted += _fit_group(student, group, training, judging, settings, cost, gather, solve=held > 0)
                done, seconds = len(fitted), time.monotonic() - started
                progress(f"fitting runs {done}/{len(runs)}, about {seconds / done * (len(runs) - done):.0f} s left")
    return FittedRuns(tuple(fitted), cost.tokens, cost.block_tokens, time.monotonic() - started)


def _check_teacher(student: StagedCausalLM, teacher: StagedCausalLM) -> None:
    ours, theirs = student.model.config, teacher.model.config
    if (ours.num_hidden_layers, ours.hidden_size) != (theirs.num_hidden_layers, theirs.hidden_size):
        raise UserError(
            f"Merged blocks are fitted to the teacher's hidden states, and `loading.teacher` has "
            f"{theirs.num_hidden_layers} blocks of width {theirs.hidden_size} where `model` has "
            f"{ours.num_hidden_layers} of {ours.hidden_size}. Leave `loading.teacher` out, or do not merge."
        )


def _starts(
    student: StagedCausalLM, target: Target, run: tuple[int, ...], settings: Merging, trailing_blocks: int
) -> list[Start]:
    """The first and the last member that may be the block that stays."""
    moves = [Move(target, tuple(run), into) for into in run]
    allowed = [move for move in moves if settings.allows(student.plan, move)]
    merged = [move.apply(student.plan, untied=False) for move in allowed or moves]  # raises where blocks are apart
    if not allowed:
        raise UserError(
            f"`tied: true` cannot merge {list(run)} in `{target}`: a stage without the merge goes on with the same "
            "weights. Merge in both stages, or leave `tied` out."
        )
    helpers = _trailing(student.plan, run, trailing_blocks)
    starts = [
        Start(move, merging_stages(student.plan, plan, move), helpers)
        for move, plan in zip(allowed, merged, strict=True)
    ]
    return [starts[0], *starts[1:][-1:]]


def _trailing(plan: StagePlan, run: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The next blocks behind a run, fewer where the model ends."""
    blocks = [block for block in plan.prefill if block > max(run)][:count]
    own = [block for block in blocks if any(block in plan.untied[stage] for stage in STAGES)]
    if count and (plan.prefill != plan.decode or own):
        raise UserError(
            "`trailing_blocks` needs a plan under which both stages run the same blocks with the same weights."
        )
    return tuple(blocks)


def _parts(
    asked: Sequence[list[Start]], teacher: StagedCausalLM, batches: Sequence[Batch], settings: Merging
) -> Iterator[Sequence[list[Start]]]:
    """Runs whose hidden states fit into `cache_bytes` together."""
    positions = sum(batch.prompt_ids.numel() + batch.response_ids.numel() for batch in batches)
    place = positions * teacher.model.config.hidden_size * teacher.model.dtype.itemsize
    most = max(settings.pairs_at_once, settings.cache_bytes // max(1, place) - 1)  # neighbours share a place
    for first in range(0, len(asked), most):
        yield asked[first : first + most]


def _fit_group(
    student: StagedCausalLM, group: Sequence[list[Start]], training: Sequence[Recording],
    judging: Sequence[Recording], settings: Merging, cost: _Cost, gather: Gather | None, *, solve: bool,
) -> list[FittedRun]:  # fmt: skip
    """Train the blocks of some runs side by side, and keep the better one of each run."""
    fits = [
        [_Fit.of(Trial.of(student, start, gather), training, judging, settings) for start in starts] for starts in group
    ]
    every = [fit for row in fits for fit in row]
    _train(every, settings, cost)
    for fit in every:
        seen, judged = (sum(map(fit.trial.tokens, recordings)) for recordings in (training, judging))
        cost.block_tokens += 2 * judged * len(fit.trial.blocks)
        if solve and settings.steps and fit.trial.last_projection is not None:
            solve_last_projection(fit.trial, training, judging)
            cost.block_tokens += (seen + PASSES * judged) * len(fit.trial.blocks)
    return [max((_judged(fit, judging, settings) for fit in row), key=lambda run: run.cosine) for row in fits]


def _train(fits: Sequence[_Fit], settings: Merging, cost: _Cost) -> None:
    weights = [parameter for fit in fits for parameter in fit.trial.blocks.parameters()]
    peaks = [settings.learning_rate * max(float(x.detach().square().mean().sqrt()), _SMALLEST) for x in weights]
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in weights])
    for step in range(settings.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _rate(step, settings.steps)
        optimizer.zero_grad()
        for fit in fits:  # one after another, so that one block's activations are in memory
            batch = fit.batches[step]
            with torch.enable_grad():
                loss = F.mse_loss(fit.trial.output(batch), fit.trial.target(batch)) / fit.scale
                loss.backward()
            nn.utils.clip_grad_norm_(fit.trial.blocks.parameters(), 1.0)
            tokens = fit.trial.tokens(batch)
            cost.tokens += tokens
            cost.block_tokens += 3 * tokens * len(fit.trial.blocks)
        optimizer.step()
        torch.clear_autocast_cache()  # under the caller's autocast it holds these weights as they were
    optimizer.zero_grad()  # the least squares need the room


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, 0.5 * (1 + cos(pi * step / steps)))


def _judged(fit: _Fit, judging: Sequence[Recording], settings: Merging) -> FittedRun:
    """The block as the student would hold it, in its element type."""
    trial = fit.trial
    trial.blocks.requires_grad_(False).to(trial.student.model.dtype)
    cosine, mse = trial.judge(judging)
    blocks = {int(index): block for index, block in trial.blocks.items()} if cosine >= settings.min_cosine else {}
    into = blocks.pop(trial.start.into, None)
    return FittedRun(trial.start.move, trial.start.stands_for, cosine, fit.plain_cosine, mse, into, blocks)
