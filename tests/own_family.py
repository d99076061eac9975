"""Adapters as a user writes them, named by class path in `test_adapters.py`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pdtrim_pl.models.architectures import Llama, LlamaLine, RoPE


class Arcee(LlamaLine):
    """A family that transformers knows and the package does not: Llama with another MLP."""

    last_projection = "mlp.down_proj"


class OwnConfig(LlamaConfig):
    """A family that nobody else knows."""

    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class PerBlockConfig(LlamaConfig):
    """A family whose blocks may have different numbers of channels. Llama's check reads one number of heads."""

    model_type = "per_block_llama"


class PerBlockForCausalLM(LlamaForCausalLM):
    """Llama that builds each block from the settings of this block."""

    config_class = PerBlockConfig

    def __init__(self, config: PerBlockConfig) -> None:
        config.allow_global_per_layer_attribute_access = True  # while it builds the blocks that are replaced
        super().__init__(config)
        config.allow_global_per_layer_attribute_access = False
        own = config.per_layer_config
        self.model.layers = nn.ModuleList(LlamaDecoderLayer(own[i], i) for i in range(config.num_hidden_layers))
        self.post_init()


AutoConfig.register("per_block_llama", PerBlockConfig)
AutoModelForCausalLM.register(PerBlockConfig, PerBlockForCausalLM)
AutoConfig.register("own_llama", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)


class Own(LlamaLine):
    """Says when its keys and values are asked for."""

    asked: ClassVar[list[int]] = []

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        self.asked.append(hidden.shape[1])
        return super().keys_values(block, hidden, rope)


class PerBlock(Llama):
    """The adapter of `PerBlockForCausalLM`."""


class Tuned(LlamaLine):
    """Has a setting of its own."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor


class NoAdapter:
    """Is none."""
