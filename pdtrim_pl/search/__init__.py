"""Search for the blocks to remove: one-shot or greedy first, then simulated annealing, for one round or both stages."""

from pdtrim_pl.search.annealing import Annealing, anneal
from pdtrim_pl.search.choose import choose_drops
from pdtrim_pl.search.greedy import Chooser, Growth, Option, grow
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.joint import JointSearch
from pdtrim_pl.search.kv_only import refit_kv_only
from pdtrim_pl.search.merges import distillation_set, replace_span
from pdtrim_pl.search.mixed import WidthMoves
from pdtrim_pl.search.narrow import Narrowed, Narrowing, check_units, narrow
from pdtrim_pl.search.rounds import RoundSearch
from pdtrim_pl.search.space import Space

__all__ = [
    "Annealing",
    "Chooser",
    "Growth",
    "Guards",
    "JointSearch",
    "Narrowed",
    "Narrowing",
    "Option",
    "RoundSearch",
    "Space",
    "WidthMoves",
    "anneal",
    "check_units",
    "choose_drops",
    "distillation_set",
    "grow",
    "narrow",
    "refit_kv_only",
    "replace_span",
]
