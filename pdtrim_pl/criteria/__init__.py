"""Criteria: how much harm a removal does in a stage. Each criterion is one small class."""

from pdtrim_pl.criteria.base import Criterion, ScoringContext
from pdtrim_pl.criteria.baselines import LastN, Random
from pdtrim_pl.criteria.cosine import CosineRedundancy
from pdtrim_pl.criteria.greedy_kl import GreedyKL
from pdtrim_pl.criteria.perplexity import ResponsePerplexity
from pdtrim_pl.criteria.taylor import Taylor
from pdtrim_pl.criteria.width import (
    ActivationNorm,
    ActivationTimesWeight,
    LeastSquaresError,
    UnitTaylor,
    WidthCriterion,
)

__all__ = [
    "ActivationNorm",
    "ActivationTimesWeight",
    "CosineRedundancy",
    "Criterion",
    "GreedyKL",
    "LastN",
    "LeastSquaresError",
    "Random",
    "ResponsePerplexity",
    "ScoringContext",
    "Taylor",
    "UnitTaylor",
    "WidthCriterion",
]
