"""The end of a local fit: the last projection by least squares.

Most families add what the last projection of a block makes of its input to the residual stream as it is. So the output
is linear in its weights, and their best change, all other weights as they are, solves a ridge regression. Gradient
steps come near to that; this gets there.

Shapes: N real tokens of the stages that merge, I inputs of the projection, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.merging.recording import Recording
from pdtrim_pl.merging.trial import Trial

RIDGES = (1.0, 0.1, 0.01)
"""What is added to the diagonal of the Gram matrix, as a share of its mean."""
PASSES = len(RIDGES) + 1
"""How often what is judged on runs, beside what is solved for, which runs once."""


@torch.no_grad()
def solve_last_projection(trial: Trial, training: Sequence[Recording], judging: Sequence[Recording]) -> None:
    """Set the last projection to the ridge solution that is best on `judging`, by squared error and by cosine.

    Where none is better in both, nothing changes. Ranks that shard the student make the same passes,
    whatever rounding or a fit that diverged makes of the numbers. Three matrices [I, I] in fp64 are in memory for a
    while.

    Args:
        trial: after its steps, of a family that has such a projection.
        training: what is solved for.
        judging: other text.
    """
    assert trial.last_projection is not None
    weight = trial.last_projection.weight
    gram, cross = moments(trial, training)
    diagonal, scale = gram.diagonal().clone(), gram.diagonal().mean().clamp_min(1e-12)
    before, best = weight.clone(), weight.clone()
    closest, least = trial.judge(judging)
    for ridge in RIDGES:
        gram.diagonal().copy_(diagonal + ridge * scale)
        factor, _ = torch.linalg.cholesky_ex(gram)  # of a fit that diverged: no number, never better
        _set(weight, before + torch.cholesky_solve(cross, factor).T.to(weight.dtype))
        cosine, error = trial.judge(judging)
        if error < least and cosine >= closest:
            closest, least, best = cosine, error, weight.clone()
    _set(weight, best)


def _set(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)
    torch.clear_autocast_cache()  # under the caller's autocast it holds the weight as it was


@torch.no_grad()
def moments(trial: Trial, recordings: Sequence[Recording]) -> tuple[Tensor, Tensor]:
    """Of the last projection's inputs with each other, [I, I], and with what is missing at the output, [I, H].

    Products in fp32, sums in fp64.
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
            with torch.autocast(weight.device.type, enabled=False):  # whose products would be in bf16
                gram += inputs.T @ inputs
                cross += inputs.T @ missing
            seen.clear()
    finally:
        hook.remove()
    return gram, cross
