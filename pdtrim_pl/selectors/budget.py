"""The selector that reaches a reduction of the bytes on the wire."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import KEEP_ALL, KVRetentionPolicy, Retention
from pdtrim_pl.plan.codec import FORMS, Form
from pdtrim_pl.selectors.allocation import Allocation
from pdtrim_pl.selectors.base import KVSelector, SelectionContext, SelectorLoad
from pdtrim_pl.selectors.menu import INTEGERS

log = logging.getLogger(__name__)

Order = Literal["mass", "damage"]
FLOOR_STEPS = 7
"""Number of bisection steps on the bytes, if recall is below the floor."""


@dataclass(frozen=True)
class Effort:
    """Settings of the measurements that choose the bits of every block."""

    examples: int = 8
    """Number of calibration requests; as many requests that repeat their prompt are added. Every block needs three
    decode passes over them."""
    exchanges: bool = False
    """Exchange bytes between blocks after the first choice, as long as the joint damage falls. This needs about five
    more decode passes for every block."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"`effort.examples` is {self.examples}: give at least 1.")


class BudgetSelector(KVSelector):
    """Reaches a given reduction of the bytes on the wire with the least damage.

    With codecs, the bits of keys and values are chosen for each block, so that the KL to the teacher is least. A block
    may also be trimmed: it then sends only its first and last positions. Half of the requests that the KL is measured
    on repeat their prompt, so blocks that look back are not trimmed. With `codecs: [none]` nothing is rounded: as few
    blocks as needed are trimmed, and prompts lose their middle there. The reduction is relative to the unpruned model
    that sends everything, so dropped decode blocks count towards it. The default is the figure of PDTrim (arXiv
    2509.04467).

    Args:
        reduction: full bytes divided by sent bytes, at least 1.
        codecs: forms that keys and values may have. They may also be sent unrounded if the bytes allow it. `none` alone
            leaves out positions instead.
        min_recall: floor on recall, as a share of the student's recall when everything is sent. If recall is lower,
            more bytes are sent until it is reached, with a warning. Not used with `codecs: [none]`.
        effort: settings of the measurements that choose the bits.
        first: prompt positions at the start that a trimmed block sends.
        last: prompt positions at the end that a trimmed block sends.
        order: order in which blocks are trimmed without codecs: `mass` by descending attention mass; `damage` by
            ascending KL to the teacher when only this block is trimmed, which needs one decode pass over the
            calibration data per block.
        prompt_tokens: length of the prompt for which the bytes are counted.
        trim: with codecs, whether blocks may be trimmed.

    Raises:
        UserError: an argument is out of range. `select` raises it if the reduction cannot be reached.
    """

    def __init__(
        self,
        reduction: float = 4.95,
        first: int | float = 4,
        last: int | float = 0.2,
        order: Order = "mass",
        prompt_tokens: int = 1024,
        codecs: Sequence[Form] = INTEGERS,
        min_recall: float = 0.97,
        effort: Effort = Effort(),
        trim: bool = True,
    ) -> None:
        super().__init__(first, last)
        if reduction < 1.0:
            raise UserError(f"`reduction` is {reduction!r}: give full bytes over sent bytes, at least 1.")
        if order not in get_args(Order):
            raise UserError(f"`order` is {order!r}, not one of {', '.join(get_args(Order))}.")
        if prompt_tokens < 2:
            raise UserError(f"`prompt_tokens` is {prompt_tokens!r}: count the bytes of a prompt of at least 2 tokens.")
        if not codecs or not set(codecs) <= set(FORMS):
            raise UserError(f"`codecs` is {list(codecs)}: give some of {', '.join(FORMS)}.")
        if not 0.0 <= min_recall <= 1.0:
            raise UserError(f"`min_recall` is {min_recall!r}: give a share, from 0 to 1.")
        self.reduction, self.order, self.prompt_tokens = reduction, order, prompt_tokens
        self.codecs, self.min_recall, self.effort, self.trim = tuple(codecs), min_recall, effort, trim

    @property
    def looks_at_mass(self) -> bool:
        return self._trims

    def load(self) -> SelectorLoad:
        if self._trims:
            return SelectorLoad(calibration=self.order == "damage", eager_attention=True)
        return SelectorLoad(examples=self.effort.examples)

    @property
    def _trims(self) -> bool:
        """Whether positions are left out instead of rounding."""
        return set(self.codecs) == {"none"}

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        return self._trimmed(context) if self._trims else self._coded(context)

    # Codecs

    def _coded(self, context: SelectionContext) -> dict[int, Retention]:
        trimmed = self.rule if self.trim else None
        allocation = Allocation(context.plan, context.kv_shape, self.codecs, self.prompt_tokens, trimmed)
        everything = KVRetentionPolicy(context.plan.boundary, context.kv_shape).full_bytes(
            context.plan, self.prompt_tokens
        )
        self._check_codecs_reach(everything / allocation.bytes_of(allocation.smallest))

        def energy(rules: Mapping[int, Retention]) -> float:
            return context.energy(rules, self.effort.examples)

        allocation.measure(energy)
        budget = everything / self.reduction
        choice = allocation.cheapest(budget)
        if self.effort.exchanges:
            choice = allocation.exchanged(choice, budget, energy)
        choice = self._above_the_floor(context, allocation, choice, budget)
        reached = everything / allocation.bytes_of(choice)
        if reached < self.reduction:
            log.warning(
                "`reduction: %.2f` would leave less than %.2f (`min_recall`) of the recall with everything sent: %.2f "
                "times fewer bytes cross.", self.reduction, self.min_recall, reached,
            )  # fmt: skip
        return dict(sorted(allocation.rules(choice).items()))

    def _above_the_floor(
        self, context: SelectionContext, allocation: Allocation, choice: dict[int, Retention], budget: float
    ) -> dict[int, Retention]:
        """The choice, with as many more bytes as `min_recall` needs. Bisection finds the number of bytes."""
        least = self.min_recall * context.recall({})  # recall when everything is sent
        if context.recall(allocation.rules(choice)) >= least:
            return choice
        low, high = budget, float(allocation.bytes_of(dict.fromkeys(allocation.blocks, KEEP_ALL)))
        enough = allocation.filled_up(choice, high)
        for _ in range(FLOOR_STEPS):
            middle = (low * high) ** 0.5
            more = allocation.filled_up(choice, middle)
            if context.recall(allocation.rules(more)) >= least:
                high, enough = middle, more
            else:
                low = middle
        return enough

    def _check_codecs_reach(self, most: float) -> None:
        if most < self.reduction:
            raise UserError(
                f"`reduction: {self.reduction}` cannot be reached: with all keys and values in the coarsest of "
                f"`codecs: {list(self.codecs)}`{' and all blocks trimmed' if self.trim else ''}, a prompt of "
                f"{self.prompt_tokens} tokens sends {_floor(most):.2f} times fewer bytes. Lower `reduction` to that, "
                "allow a coarser codec, or drop more decode blocks."
            )

    # Trimmed positions

    def _trimmed(self, context: SelectionContext) -> dict[int, Retention]:
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
