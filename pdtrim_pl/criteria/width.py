"""Criteria for MLP channels and query heads: how much it hurts to remove one of them from a block in a stage.

A criterion looks at the last layer of the MLP or of the attention, which reads the outputs of these units.

Shapes: I inputs of this layer, H hidden, U units: channels, or heads of S = I / U inputs each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pdtrim_pl.merging.least_squares import damped, ridge_solution

RIDGE = 1e-3
"""Value to add to the diagonal of the Gram matrix, as a share of its mean, so that the matrix can be inverted."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Measurements of a last layer on a text, at the real tokens of the stages that lose its units."""

    weight: Tensor
    """Weights of the layer, fp32 [H, I]."""
    gram: Tensor
    """Gram matrix of its inputs: their products with each other, summed over tokens, fp64 [I, I]."""
    units: Tensor
    """Numbers of the units in the original block, rising [U]."""
    first_order: Tensor | None = None
    """First-order effect of each unit on the response loss [U]; see `unit_effects`. None unless the criterion
    `wants_gradients`."""

    @property
    def size(self) -> int:
        """Number of inputs of a unit, S."""
        return len(self.gram) // len(self.units)

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums over the inputs of every unit, [I] -> [U]."""
        return values.view(-1, self.size).sum(1)

    def only(self, units: Collection[int]) -> Seen:
        """The measurements of some units, with the weights as they are."""
        stay = self._marked(units)
        left = stay.repeat_interleave(self.size)
        first_order = None if self.first_order is None else self.first_order[stay]
        return Seen(self.weight[:, left], self.gram[left][:, left], self.units[stay], first_order)

    def refitted(self, units: Collection[int]) -> Seen:
        """The measurements of some units, with weights that are refitted to make up for the loss of the others."""
        left = self._marked(units).repeat_interleave(self.size)
        if bool(left.all()):
            return self
        cross = self.gram[left][:, ~left] @ self.weight[:, ~left].T.double()
        seen = self.only(units)
        return replace(seen, weight=seen.weight + ridge_solution(seen.gram, cross, RIDGE).T.to(seen.weight.dtype))

    def _marked(self, units: Collection[int]) -> Tensor:
        return torch.isin(self.units, torch.tensor(sorted(units), device=self.units.device))


class WidthCriterion(ABC):
    """Scores the units of one block. A subclass names itself and writes `harm`."""

    name: ClassVar[str]
    """Name of the criterion in the history of a plan."""
    rounds: ClassVar[int] = 1
    """Number of times that units are scored while they leave a block. Before each new scoring the layer is refitted."""
    wants_gradients: ClassVar[bool] = False
    """Whether it reads `Seen.first_order`."""

    @abstractmethod
    def harm(self, seen: Seen) -> Tensor:
        """Harm of removing each unit; lower is better, [U]."""


class ActivationNorm(WidthCriterion):
    """Norm of the output of a unit, which is an input of the last layer (Minitron, arXiv 2407.14679)."""

    name = "activation_norm"

    def harm(self, seen: Seen) -> Tensor:
        return seen.per_unit(seen.gram.diagonal()).sqrt()


class ActivationTimesWeight(WidthCriterion):
    """Norm of the output of a unit times the norm of the weights that read it (Wanda, arXiv 2306.11695, by columns)."""

    name = "activation_times_weight"

    def harm(self, seen: Seen) -> Tensor:
        return seen.per_unit(seen.gram.diagonal() * seen.weight.double().square().sum(0)).sqrt()


class UnitTaylor(WidthCriterion):
    """First-order change of the response loss when the unit is removed (arXiv 1611.06440, on channels and heads)."""

    name = "unit_taylor"
    wants_gradients = True

    def harm(self, seen: Seen) -> Tensor:
        assert seen.first_order is not None
        return seen.first_order


class LeastSquaresError(WidthCriterion):
    """Squared error of the last layer's output without the unit, after the best refit of all other weights.

    G is the inverse of the Gram matrix. The error is tr(W G^-1 W'), with the weights W of the unit and its part of G:
    Optimal Brain Surgeon (arXiv 2301.00774, equation 3, for whole units). Units leave in several `rounds`, because the
    error changes with every unit that leaves.
    """

    name = "least_squares"
    rounds = 8

    def harm(self, seen: Seen) -> Tensor:
        size = seen.size
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(seen.gram, RIDGE)))
        if size == 1:
            return seen.weight.double().square().sum(0) / inverse.diagonal()
        units = len(inverse) // size
        own = torch.stack([inverse[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(units)])
        weight = seen.weight.double().T.reshape(units, size, -1)
        return (torch.linalg.solve(own, weight) * weight).sum((1, 2))
