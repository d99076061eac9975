"""KV selectors: they choose what each block of D sends, and in how many bits. YAML names them by class path.

A new selector is a subclass of `KVSelector` with one method. For example, to trim every second block of D:

    class EverySecond(KVSelector):
        def select(self, context: SelectionContext) -> dict[int, Retention]:
            return {block: self.rule for block in context.plan.decode[::2]}
"""

from pdtrim_pl.selectors.base import KVSelector, SelectionContext, SelectorLoad, selection_context
from pdtrim_pl.selectors.budget import BudgetSelector, Effort
from pdtrim_pl.selectors.mass import MassSelector, NoSelector
from pdtrim_pl.selectors.menu import WireMenu, policies_within

__all__ = [
    "BudgetSelector", "Effort", "KVSelector", "MassSelector", "NoSelector", "SelectionContext", "SelectorLoad",
    "WireMenu", "policies_within", "selection_context",
]  # fmt: skip
