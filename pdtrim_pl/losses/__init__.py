"""Distillation losses between teacher and student. Each loss is one small class, which YAML names by class path."""

from pdtrim_pl.losses.base import Distilled, Head, LossTerm, StateLoss, TokenLoss
from pdtrim_pl.losses.chunked import check_terms, chunks, token_weights, training_loss
from pdtrim_pl.losses.states import HiddenMatch, KVMatch
from pdtrim_pl.losses.tokens import JSD, KL, CrossEntropy, ReverseKL

__all__ = [
    "JSD", "KL", "CrossEntropy", "Distilled", "Head", "HiddenMatch", "KVMatch", "LossTerm", "ReverseKL", "StateLoss",
    "TokenLoss", "check_terms", "chunks", "token_weights", "training_loss",
]  # fmt: skip
