"""How much would this removal hurt, for this stage? One small class a criterion."""

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.criteria.cosine import CosineRedundancy
from pdtrim_pl.criteria.greedy_kl import GreedyKL

__all__ = ["CosineRedundancy", "Criterion", "GreedyKL", "ScoringContext"]
