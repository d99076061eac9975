"""Refit a layer that lost some of its inputs, so that its output changes as little as possible.

Shapes: I inputs of the layer, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.merging.least_squares import ridge_solution

RIDGES = (1e-1, 1e-2, 1e-3)
"""Values to add to the diagonal of the Gram matrix, as shares of its mean."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The result of a refit."""

    change: Tensor | None
    """What to add to the weights, fp32 [H, I]; None if no refit reduces the error on held-back text."""
    error: float
    """Squared error of the layer's output on held-back text, as a share of the squared output. It is measured before
    the layer is fitted to this text too."""


def refit(weight: Tensor, gram: Tensor, judged: Tensor | None, before: Tensor, after: Tensor) -> Refitted:
    """Refit a layer by ridge regression.

    The ridge is the one with the least error on held-back text. The layer is then fitted with this ridge to all text,
    held back or not. If no ridge reduces the error on held-back text, the layer does not change.

    Args:
        weight: weights of the layer, fp32 [H, I].
        gram: Gram matrix of its inputs on the text to fit to, fp64 [I, I].
        judged: Gram matrix on the text that is held back; None if no text is.
        before: the inputs that the layer had, bool [I].
        after: the inputs that are left, bool [I].
    """
    gone = before & ~after
    full = weight.double() * before
    lost = full[:, gone].T
    deviation = -(full * gone)
    measured = gram if judged is None else judged
    output = float(((full @ measured) * full).sum())
    least, best = float(((deviation @ measured) * deviation).sum()), None
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
    """The change of the weights of the inputs that are left, fp64 [H, inputs left]."""
    return ridge_solution(gram[after][:, after], gram[after][:, gone] @ lost, ridge).T
