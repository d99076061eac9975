"""How much would this removal hurt, for this stage? One small class a criterion."""

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.criteria.baselines import LastN, Random
from pdtrim_pl.criteria.cosine import CosineRedundancy
from pdtrim_pl.criteria.greedy_kl import GreedyKL
from pdtrim_pl.criteria.perplexity import ResponsePerplexity
from pdtrim_pl.criteria.taylor import Taylor

__all__ = [
    "CosineRedundancy",
    "Criterion",
    "GreedyKL",
    "LastN",
    "Random",
    "ResponsePerplexity",
    "ScoringContext",
    "Taylor",
]
