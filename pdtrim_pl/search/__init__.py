"""Which removals: candidates, guards, and the choice among them."""

from pdtrim_pl.search.choose import Guards, choose_drops

__all__ = ["Guards", "choose_drops"]
