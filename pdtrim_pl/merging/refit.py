"""A last layer is refitted on the inputs that are left to it, so that its output is as before.

Shapes: I inputs of the layer, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.merging.least_squares import ridge_solution

RIDGES = (1e-1, 1e-2, 1e-3)
"""What is added to the diagonal of the Gram matrix, as a share of its mean."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """What became of a layer that lost inputs."""

    change: Tensor | None
    """What is added to its weights, fp32 [H, I]; None where held-back text does not agree, or there is none."""
    error: float
    """Squared error of its output as a share of the output's square, on held-back text before it was fitted to too."""


def refit(weight: Tensor, gram: Tensor, judged: Tensor | None, before: Tensor, after: Tensor) -> Refitted:
    """Refit a layer by ridge regression, with the ridge that is best on held-back text; no change where none is better.

    With that ridge all text is fitted to, held back or not.

    Args:
        weight: fp32 [H, I].
        gram: products of the inputs with each other, summed over the text that is fitted on, fp64 [I, I].
        judged: the same of the text that is held back; None where there is none.
        before: the inputs that it had, bool [I].
        after: those that are left, bool [I].
    """
    gone = before & ~after
    full = weight.double() * before
    lost = full[:, gone].T
    deviation = -(full * gone)
    told = gram if judged is None else judged
    output = float(((full @ told) * full).sum())
    least, best = float(((deviation @ told) * deviation).sum()), None
    if judged is not None:
        chosen = None
        for ridge in RIDGES:
            deviation[:, after] = _solution(gram, after, gone, lost, ridge)
            error = float(((deviation @ judged) * deviation).sum())
            if error < least:
                least, chosen = error, ridge
        if chosen is not None:
            best = torch.zeros_like(weight)
            best[:, after] = _solution(gram + judged, after, gone, lost, chosen).to(weight.dtype)
    return Refitted(best, least / output if output > 0.0 else 0.0)


def _solution(gram: Tensor, after: Tensor, gone: Tensor, lost: Tensor, ridge: float) -> Tensor:
    """What the weights of the inputs that are left must change by, fp64 [H, inputs left]."""
    return ridge_solution(gram[after][:, after], gram[after][:, gone] @ lost, ridge).T
