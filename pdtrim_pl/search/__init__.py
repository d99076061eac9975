"""Which removals: candidates, guards, greedy and one-shot choice, annealing, journal."""

from pdtrim_pl.search.annealing import Annealing, RoundSearch, anneal
from pdtrim_pl.search.choose import choose_drops
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.journal import Journal

__all__ = ["Annealing", "Guards", "Journal", "RoundSearch", "anneal", "choose_drops"]
