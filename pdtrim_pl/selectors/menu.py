"""The wire in a joint search: for every plan, the policy of least damage that meets a share of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.plan.codec import FORMS, Form
from pdtrim_pl.selectors.allocation import Allocation
from pdtrim_pl.selectors.base import SelectionContext

INTEGERS: tuple[Form, ...] = ("int8", "int4", "int3", "int2")


@dataclass(frozen=True)
class WireMenu:
    """The rules that a joint search may give to blocks.

    Raises:
        UserError: an unknown codec, nothing to choose from, or fewer than one example.
    """

    codecs: Sequence[Form] = INTEGERS
    """Forms that keys and values may have. They may also be sent unrounded if the bytes allow it. `none` alone rounds
    nothing."""
    trimmed: Retention | None = Retention("first_last", 4, 0.2)
    """Positions that a block may send instead of all; null: every block sends all positions."""
    examples: int = 8
    """Number of calibration requests to measure damage on; as many requests that repeat their prompt are added."""

    def __post_init__(self) -> None:
        if not set(self.codecs) <= set(FORMS):
            raise UserError(f"`wire.codecs` is {list(self.codecs)}: give some of {', '.join(FORMS)}.")
        if set(self.codecs) <= {"none"} and self.trimmed is None:
            raise UserError("`wire` leaves nothing to choose: give `codecs`, or the positions of a `trimmed` block.")
        if self.examples < 1:
            raise UserError(f"`wire.examples` is {self.examples}: give at least 1.")


def policies_within(
    share: float, context: SelectionContext, menu: WireMenu, prompt_tokens: int
) -> Callable[[StagePlan], KVRetentionPolicy]:
    """Make a function that returns the policy of a plan.

    Damages are measured once, here, on the plan of the context. Every rank must call this.

    Args:
        share: maximum bytes of a request, as a share of the bytes of the unpruned model that sends everything. If no
            policy is so small, the function returns the smallest one.
        context: context of a plan that has all decode blocks of the plans that the function will get.
        menu: the rules that blocks may have.
        prompt_tokens: length of the prompt for which bytes are counted.
    """
    forms = [form for form in menu.codecs if form != "none"]
    shape = context.kv_shape
    allocation = Allocation(context.plan, shape, forms, prompt_tokens, menu.trimmed)
    # The function below must not hold the context: a search needs the memory of its prompt caches.
    allocation.measure(lambda rules: context.energy(rules, menu.examples))
    everything = KVRetentionPolicy(context.plan.boundary, shape).full_bytes(context.plan, prompt_tokens)

    def policy_of(plan: StagePlan) -> KVRetentionPolicy:
        choice = allocation.cheapest(share * everything, plan.decode)
        return KVRetentionPolicy(plan.boundary, shape, allocation.rules(choice))

    return policy_of
