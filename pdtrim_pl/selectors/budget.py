"""The selector that reaches a reduction of the bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Retention
from pdtrim_pl.selectors.base import KVSelector, SelectionContext

Order = Literal["mass", "damage"]


class BudgetSelector(KVSelector):
    """Trims as few blocks as reach a reduction of the bytes on the wire, the least harmful first.

    The reduction counts against the unpruned model sending everything, so decode blocks that were dropped are part of
    it. The default is the figure of PDTrim (arXiv 2509.04467).

    Args:
        reduction: full bytes over sent bytes, at least 1.
        first: see `KVSelector`.
        last: see `KVSelector`.
        order: `mass` trims blocks in descending attention mass; `damage` in ascending KL to the teacher when only that
            block is trimmed, which costs a decode pass over the calibration data a block.
        prompt_tokens: length of the prompt at which the bytes are counted.

    Raises:
        UserError: an argument out of range; and from `select`, a reduction that cannot be reached.
    """

    def __init__(
        self,
        reduction: float = 4.95,
        first: int | float = 4,
        last: int | float = 0.2,
        order: Order = "mass",
        prompt_tokens: int = 1024,
    ) -> None:
        super().__init__(first, last)
        if reduction < 1.0:
            raise UserError(f"`reduction` is {reduction!r}: give full bytes over sent bytes, at least 1.")
        if order not in get_args(Order):
            raise UserError(f"`order` is {order!r}, not one of {', '.join(get_args(Order))}.")
        if prompt_tokens < 2:
            raise UserError(f"`prompt_tokens` is {prompt_tokens!r}: count the bytes of a prompt of at least 2 tokens.")
        self.reduction, self.order, self.prompt_tokens = reduction, order, prompt_tokens

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        self._check_reachable(context)
        rules: dict[int, Retention] = {}
        waiting = iter(() if self._reached(context, rules) else self._least_harmful_first(context))
        while not self._reached(context, rules):
            rules[next(waiting)] = self.rule
        return dict(sorted(rules.items()))

    def _reached(self, context: SelectionContext, rules: Mapping[int, Retention]) -> bool:
        return context.sent_ratio(rules, self.prompt_tokens) >= self.reduction

    def _least_harmful_first(self, context: SelectionContext) -> list[int]:
        if self.order == "mass":
            return sorted(context.plan.decode, key=lambda block: -context.mass[block])
        return sorted(context.plan.decode, key=lambda block: context.damage(block, self.rule))

    def _check_reachable(self, context: SelectionContext) -> None:
        most = context.sent_ratio(dict.fromkeys(context.plan.decode, self.rule), self.prompt_tokens)
        if most < self.reduction:
            raise UserError(
                f"`reduction: {self.reduction}` cannot be reached: with all {len(context.plan.decode)} decode blocks "
                f"trimmed to `first: {self.first}` and `last: {self.last}`, a prompt of {self.prompt_tokens} tokens "
                f"sends {_floor(most):.2f} times fewer bytes. Lower `reduction` to that, lower `last` or `first`, or "
                "drop more decode blocks."
            )


def _floor(ratio: float) -> float:
    """Rounded down to two digits, so that the value named in a message can be reached."""
    return int(ratio * 100) / 100
