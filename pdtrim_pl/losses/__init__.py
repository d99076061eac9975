"""Distillation losses between teacher and student. One small class a loss, named in YAML by class path."""

from pdtrim_pl.losses.base import Distilled, Head, LossTerm, StateLoss, TokenLoss
from pdtrim_pl.losses.chunked import check_terms, chunks, distillation_loss, token_weights, weighted_sum
from pdtrim_pl.losses.states import HiddenMatch, KVMatch
from pdtrim_pl.losses.tokens import JSD, KL, CrossEntropy, ReverseKL

__all__ = [
    "JSD", "KL", "CrossEntropy", "Distilled", "Head", "HiddenMatch", "KVMatch", "LossTerm", "ReverseKL", "StateLoss",
    "TokenLoss", "check_terms", "chunks", "distillation_loss", "token_weights", "weighted_sum",
]  # fmt: skip
