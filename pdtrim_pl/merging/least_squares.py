"""The end of a local fit: solve the last projection of the block by least squares.

In most families, the output of a block's last projection is added to the residual stream unchanged. So the output of
the block is linear in the weights of this projection. If all other weights are fixed, the best change of these weights
is the solution of a ridge regression. Gradient steps only come close to it.

Shapes: N real tokens of the stages that merge, I inputs of the projection, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.merging.recording import Recording
from pdtrim_pl.merging.trial import Trial

RIDGES = (1.0, 0.1, 0.01)
"""Values to add to the diagonal of the Gram matrix, as shares of its mean."""
PASSES = len(RIDGES) + 1
"""Number of passes over the `judging` text; the `training` text needs one."""


@torch.no_grad()
def solve_last_projection(trial: Trial, training: Sequence[Recording], judging: Sequence[Recording]) -> None:
    """Set the last projection to the ridge solution that is best on `judging`, by squared error and by cosine.

    If no solution is better in both, nothing changes. The number of passes does not depend on the data, so ranks with
    sharded weights stay in step. Three matrices [I, I] in fp64 are in memory for a while.

    Args:
        trial: a trial after its optimizer steps, of a family with a `last_projection`.
        training: the text to solve for.
        judging: held-out text.
    """
    assert trial.last_projection is not None
    weight = trial.last_projection.weight
    gram, cross = moments(trial, training)
    before, best = weight.clone(), weight.clone()
    closest, least = trial.judge(judging)
    for ridge in RIDGES:
        _set(weight, before + ridge_solution(gram, cross, ridge).T.to(weight.dtype))
        cosine, error = trial.judge(judging)
        if error < least and cosine >= closest:
            closest, least, best = cosine, error, weight.clone()
    _set(weight, best)


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The X [I, H] of least ||A X - B||^2 + r ||X||^2. Not a number where A is none.

    Args:
        gram: A'A, fp64 [I, I].
        cross: A'B, fp64 [I, H].
        ridge: r, as a share of the mean of the Gram matrix's diagonal.
    """
    factor, _ = torch.linalg.cholesky_ex(damped(gram, ridge))
    return torch.cholesky_solve(cross, factor)


def damped(gram: Tensor, ridge: float) -> Tensor:
    """A Gram matrix with `ridge` times the mean of its diagonal added to this diagonal, so that it can be inverted."""
    out = gram.clone()
    out.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    return out


def _set(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)
    torch.clear_autocast_cache()  # the caller's autocast may have cached the old weight


@torch.no_grad()
def moments(trial: Trial, recordings: Sequence[Recording]) -> tuple[Tensor, Tensor]:
    """Second moments of the inputs x of the last projection: x'x [I, I], and x'e [I, H] with the output error e.

    Products are in fp32, sums in fp64.
    """
    projection, seen = trial.last_projection, list[Tensor]()
    assert projection is not None
    weight = projection.weight
    wide, narrow = weight.shape[1], weight.shape[0]
    gram, cross = (weight.new_zeros(wide, columns, dtype=torch.float64) for columns in (wide, narrow))
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for recording in filter(trial.tokens, recordings):
            missing = trial.target(recording) - trial.output(recording)
            inputs = torch.cat([x[v].float() for x, v in zip(seen, trial.valid(recording), strict=True)])
            with torch.autocast(weight.device.type, enabled=False):  # autocast would multiply in bf16
                gram += inputs.T @ inputs
                cross += inputs.T @ missing
            seen.clear()
    finally:
        hook.remove()
    return gram, cross
