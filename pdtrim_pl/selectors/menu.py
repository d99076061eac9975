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
    """What blocks may send.

    Raises:
        UserError: an unknown codec, nothing to choose from, or fewer than one example.
    """

    codecs: Sequence[Form] = INTEGERS
    """Forms of keys and values; they cross as they are too where that fits. `none` alone rounds nothing."""
    trimmed: Retention | None = Retention("first_last", 4, 0.2)
    """The positions that a block may send instead of all; null: every block sends all positions."""
    examples: int = 8
    """Calibration requests that damages are measured on, and as many that repeat their prompt."""

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
    """A function from a plan to its policy. Damages are measured once, on the plan of the context; all ranks call it.

    Args:
        share: of the bytes of the unpruned model that sends everything, which a request may take. Where no choice is so
            small, the policy is the smallest one.
        context: of a plan that has all blocks of the plans to come.
        menu: what blocks may send.
        prompt_tokens: length of the prompt at which bytes are counted.
    """
    forms = [form for form in menu.codecs if form != "none"]
    allocation = Allocation(context, forms, prompt_tokens, menu.examples, menu.trimmed)
    allocation.measure()
    # A search holds the returned function, and needs the memory for caches of its own.
    allocation.forget_measurements()
    shape = context.kv_shape
    everything = KVRetentionPolicy(context.plan.boundary, shape).full_bytes(context.plan, prompt_tokens)

    def policy_of(plan: StagePlan) -> KVRetentionPolicy:
        choice = allocation.cheapest(share * everything, plan.decode)
        return KVRetentionPolicy(plan.boundary, shape, allocation.rules(choice))

    return policy_of
