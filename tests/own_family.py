"""Adapters as a user writes them, named by class path in `test_adapters.py`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pdtrim_pl.models.architectures import LlamaLine, RoPE


class Arcee(LlamaLine):
    """A family that transformers knows and the package does not: Llama with another MLP."""

    last_projection = "mlp.down_proj"


class OwnConfig(LlamaConfig):
    """A family that nobody else knows."""

    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


AutoConfig.register("own_llama", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)


class Own(LlamaLine):
    """Says when its keys and values are asked for."""

    asked: ClassVar[list[int]] = []

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        self.asked.append(hidden.shape[1])
        return super().keys_values(block, hidden, rope)


class Tuned(LlamaLine):
    """Has a setting of its own."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor


class NoAdapter:
    """Is none."""
