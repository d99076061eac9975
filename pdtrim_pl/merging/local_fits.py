"""Local fits: train one block to reproduce the output of a run of neighbouring blocks, for many runs at once.

Source: LLM-Streamline (arXiv 2403.19135) replaces a span of blocks by one block that is trained on the span's input and
output. Here the block is trained per stage, under the contract of one request, on recorded hidden states of the
teacher. The recipe of the fit is our own.

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
"""Minimum root mean square of a weight for its learning rate, for weights that start at zero, such as biases."""


@dataclass(frozen=True)
class FittedRuns:
    """Results of local fits, and their cost."""

    runs: tuple[FittedRun, ...]
    """One result for every run, in the order of the argument."""
    tokens: int
    """Number of positions trained on, summed over steps and fitted blocks."""
    block_tokens: int
    """Number of (token, block) pairs that ran forward. A backward pass counts as two more."""
    seconds: float
    """Wall-clock time."""

    @property
    def accepted(self) -> tuple[FittedRun, ...]:
        """The distillation set: runs that reached `min_cosine`."""
        return tuple(run for run in self.runs if run.weights is not None)


@dataclass
class _Cost:
    tokens: int = 0
    block_tokens: int = 0


@dataclass(eq=False)
class _Fit:
    """The training of one trial."""

    trial: Trial
    batches: Sequence[Recording]
    """The batch of every step."""
    scale: float
    """Mean square of what the run adds to its input. Dividing by it makes the losses of different runs comparable."""
    plain_cosine: float
    """Cosine before the fit."""

    @classmethod
    def of(cls, trial: Trial, training: Sequence[Recording], judging: Sequence[Recording], settings: Merging) -> _Fit:
        usable = [recording for recording in training if trial.tokens(recording)]
        judged = [recording for recording in judging if trial.tokens(recording)]
        if not usable or not judged:
            raise UserError(
                f"There is no {' or '.join(trial.start.stands_for)} token to fit merged blocks on: with responses of "
                "one token, decode has none. Use longer responses (`lengths` of the data), or merge in the other stage."
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
    """Fit one block to each run of neighbours of the student's plan.

    For every run, two fits start from the weights of its first and of its last block. The better one is kept. The
    teacher runs once for all runs. The result of a fit does not depend on the other runs. Batches are cut to the size
    of a step, and some of them are held out to compare fits on (`Merging.held_back`). Models and random generators are
    not changed.

    Args:
        student: provides the weights to start from, the plan and the policy.
        teacher: provides the hidden states to fit to, under its full plan.
        batches: the text to fit on.
        target: the stage(s) to merge in. Under `nested`, a merge in prefill of blocks that decode runs affects both.
        runs: original indices of neighbouring blocks in those stages.
        settings: settings of the fits.
        device: device of both models.
        gather: makes sharded weights whole, if the strategy shards them. Every rank then fits the same runs on the same
            batches.
        progress: called with lines on the progress of the fits.
        leave_if_asked: called before every group of `pairs_at_once` runs. It raises if the process has to stop.
        trailing_blocks: number of blocks after a run that are trained with it, so that the output after them matches
            the teacher. They compensate for what one block cannot do. Both stages must run the same blocks with the
            same weights.

    Raises:
        UserError: blocks are not neighbours or cannot be merged with `tied`, the teacher has other blocks, or there is
            no token to fit on in the stage(s).
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
            f"Merged blocks are fitted to the teacher's hidden states, but `loading.teacher` has "
            f"{theirs.num_hidden_layers} blocks of width {theirs.hidden_size} where `model` has "
            f"{ours.num_hidden_layers} of {ours.hidden_size}. Leave `loading.teacher` out, or do not merge."
        )


def _starts(
    student: StagedCausalLM, target: Target, run: tuple[int, ...], settings: Merging, trailing_blocks: int
) -> list[Start]:
    """The starts of a run's fits: from the first and from the last block that may stay."""
    moves = [Move(target, tuple(run), into) for into in run]
    allowed = [move for move in moves if settings.allows(student.plan, move)]
    merged = [move.apply(student.plan, untied=False) for move in allowed or moves]  # raises if they are not neighbours
    if not allowed:
        raise UserError(
            f"`tied: true` cannot merge {list(run)} in `{target}`: a stage without the merge goes on with the same "
            "weights. Merge in both stages, or leave `tied` out."
        )
    trailing = _trailing(student.plan, run, trailing_blocks)
    starts = [
        Start(move, merging_stages(student.plan, plan, move), trailing)
        for move, plan in zip(allowed, merged, strict=True)
    ]
    return [starts[0], *starts[1:][-1:]]


def _trailing(plan: StagePlan, run: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The next `count` blocks after a run; fewer at the end of the model."""
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
    """Cut the runs into parts whose hidden states fit into `cache_bytes` together."""
    positions = sum(batch.prompt_ids.numel() + batch.response_ids.numel() for batch in batches)
    place = positions * teacher.model.config.hidden_size * teacher.model.dtype.itemsize
    most = max(settings.pairs_at_once, settings.cache_bytes // max(1, place) - 1)  # neighbouring runs share states
    for first in range(0, len(asked), most):
        yield asked[first : first + most]


def _fit_group(
    student: StagedCausalLM, group: Sequence[list[Start]], training: Sequence[Recording],
    judging: Sequence[Recording], settings: Merging, cost: _Cost, gather: Gather | None, *, solve: bool,
) -> list[FittedRun]:  # fmt: skip
    """Train the blocks of some runs in the same loop, and keep the better fit of each run."""
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
        for fit in fits:  # one after another: the activations of only one fit are in memory
            batch = fit.batches[step]
            with torch.enable_grad():
                loss = F.mse_loss(fit.trial.output(batch), fit.trial.target(batch)) / fit.scale
                loss.backward()
            nn.utils.clip_grad_norm_(fit.trial.blocks.parameters(), 1.0)
            tokens = fit.trial.tokens(batch)
            cost.tokens += tokens
            cost.block_tokens += 3 * tokens * len(fit.trial.blocks)
        optimizer.step()
        torch.clear_autocast_cache()  # the caller's autocast may have cached the old weights
    optimizer.zero_grad()  # frees memory for the least squares


def _rate(step: int, steps: int) -> float:
    """Learning rate of a step, as a share of the peak: linear warm-up, then cosine decay."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, 0.5 * (1 + cos(pi * step / steps)))


def _judged(fit: _Fit, judging: Sequence[Recording], settings: Merging) -> FittedRun:
    """Evaluate a fit on held-out text, with its blocks in the element type of the student."""
    trial = fit.trial
    trial.blocks.requires_grad_(False).to(trial.student.model.dtype)
    cosine, mse = trial.judge(judging)
    blocks = {int(index): block for index, block in trial.blocks.items()} if cosine >= settings.min_cosine else {}
    into = blocks.pop(trial.start.into, None)
    return FittedRun(trial.start.move, trial.start.stands_for, cosine, fit.plain_cosine, mse, into, blocks)
