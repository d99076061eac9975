"""Refit a linear layer by least squares: for the inputs that it lost, or for other inputs than it was trained on.

Shapes: N tokens, I inputs of the layer, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from pdtrim_pl.merging.least_squares import ridge_solution

RIDGES = (1e-1, 1e-2, 1e-3)
"""Values to add to the diagonal of the Gram matrix, as shares of its mean."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The result of a refit."""

    change: Tensor | None
    """What to add to the weights, fp32 [O, I]; None if no refit reduces the error on held-back text."""
    error: float
    """Squared error of the layer's output on held-back text, as a share of the squared output. It is measured before
    the layer is fitted to this text too."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the tokens of a text, of a layer's inputs x and of what its outputs lack, e."""

    gram: Tensor
    """Sum of x x', fp64 [I, I]."""
    cross: Tensor
    """Sum of x e', fp64 [I, O]."""
    missing: float
    """Sum of e'e."""
    wanted: float
    """Sum of the squared outputs that are wanted."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram, self.cross + other.cross, self.missing + other.missing, self.wanted + other.wanted
        )

    @property
    def finite(self) -> bool:
        """Whether all sums are."""
        return bool(self.gram.isfinite().all() and self.cross.isfinite().all()) and isfinite(self.missing + self.wanted)

    def error(self, change: Tensor) -> float:
        """Squared error of the outputs after a change of the weights, fp64 [I, O]."""
        return self.missing + float(((self.gram @ change - 2 * self.cross) * change).sum())


def held_back(batches: int) -> int:
    """Number of batches that judge refits, out of so many: a quarter, at least one of two or three, none of one."""
    return batches // 4 or min(1, batches - 1)


def best_change(fitted: Moments, judged: Moments | None, ridges: tuple[float, ...] = RIDGES) -> Refitted:
    """The change of a layer's weights that makes its outputs most like those wanted, by ridge regression.

    The ridge is the one with the least error on held-back text. The layer is then fitted with this ridge to all text,
    held back or not. If no ridge reduces the error on held-back text, the layer does not change.

    Args:
        fitted: of the text to fit to.
        judged: of the text that is held back; None if no text is.
        ridges: values to try, as shares of the mean of the Gram matrix's diagonal.
    """
    measured = fitted if judged is None else judged
    least, chosen = measured.missing, None
    for ridge in () if judged is None else ridges:
        error = measured.error(ridge_solution(fitted.gram, fitted.cross, ridge))
        if error < least:
            least, chosen = error, ridge
    error = least / measured.wanted if measured.wanted > 0.0 else 0.0
    if judged is None or chosen is None:
        return Refitted(None, error)
    both = fitted + judged
    return Refitted(ridge_solution(both.gram, both.cross, chosen).T.float(), error)


def refit(weight: Tensor, gram: Tensor, judged: Tensor | None, before: Tensor, after: Tensor) -> Refitted:
    """Refit a layer that lost some of its inputs, so that its outputs change as little as possible.

    Args:
        weight: weights of the layer, fp32 [O, I].
        gram: Gram matrix of its inputs on the text to fit to, fp64 [I, I].
        judged: Gram matrix on the text that is held back; None if no text is.
        before: the inputs that the layer had, bool [I].
        after: the inputs that are left, bool [I].
    """
    gone, full = before & ~after, weight.double() * before
    lost = full[:, gone].T

    def moments(of: Tensor) -> Moments:
        cross, missing = of[after][:, gone] @ lost, float(((of[gone][:, gone] @ lost) * lost).sum())
        return Moments(of[after][:, after], cross, missing, float(((full @ of) * full).sum()))

    found = best_change(moments(gram), None if judged is None else moments(judged))
    if found.change is None:
        return found
    change = torch.zeros_like(weight)
    change[:, after] = found.change.to(weight.dtype)
    return Refitted(change, found.error)
