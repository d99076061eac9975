"""Distillation after another method."""

from __future__ import annotations

from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method
from pdtrim_pl.errors import UserError
from pdtrim_pl.strategies.layer_rates import LayerRates


class Distilled(Method):
    """Trains the result of another method, with the rest of its token budget.

    Args:
        start: name of the other method.
        rate: factor of the optimizer's learning rate. A result that is close to the teacher needs a smaller rate.
        layer_rates: lower rates for blocks far from what the plan changed; None gives all blocks one rate.

    Raises:
        UserError: `rate` is not positive.
    """

    def __init__(self, start: str, rate: float = 1.0, layer_rates: LayerRates | None = None) -> None:
        super().__init__(start)
        if not rate > 0:
            raise UserError(f"`rate` is {rate}: give a positive factor of the learning rate.")
        self.rate, self.layer_rates = rate, layer_rates

    @property
    @override
    def trains(self) -> bool:
        return True

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        assert start is not None
        return bench.distil(start, bench.training.tokens - start.trained_tokens, self.rate, self.layer_rates)
