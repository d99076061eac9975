"""Which removals: candidates, guards, greedy and one-shot choice, annealing within a round and over both stages."""

from pdtrim_pl.search.annealing import Annealing, anneal
from pdtrim_pl.search.choose import choose_drops
from pdtrim_pl.search.greedy import Chooser, Growth, Option, grow
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.joint import JointSearch
from pdtrim_pl.search.merges import distillation_set, replace_span
from pdtrim_pl.search.rounds import RoundSearch
from pdtrim_pl.search.space import Space

__all__ = [
    "Annealing",
    "Chooser",
    "Growth",
    "Guards",
    "JointSearch",
    "Option",
    "RoundSearch",
    "Space",
    "anneal",
    "choose_drops",
    "distillation_set",
    "grow",
    "replace_span",
]
