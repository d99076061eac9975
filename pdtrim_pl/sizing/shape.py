"""The sizes of a model that memory and cost depend on, read from its configuration without memory for weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.sizing.block_size import elements


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    parameters: int
    embeddings: int
    """Parameters of token embeddings and head."""
    block: int
    """Parameters of one block."""
    largest: int
    """Parameters of the largest weight tensor."""
    hidden: int
    inner: int
    heads: int
    """Attention heads of one block."""
    kv: int
    """Elements of the keys (or of the values) of one block at one position."""
    blocks: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: Architecture | None = None) -> Shape:
        """Measure a model that is built on the meta device, with true shapes and without memory.

        Args:
            config: configuration of a decoder-only model.
            architecture: adapter of the model's family, if the package has none.

        Raises:
            UserError: there is no adapter for its family.
        """
        adapter = architecture or architecture_of(config)
        model = meta_model(config)
        block = adapter.blocks(model)[0]
        facts = config.to_dict()
        heads = config.num_attention_heads
        size = facts.get("head_dim") or config.hidden_size // heads
        sizes = [parameter.numel() for parameter in model.parameters()]
        return cls(
            parameters=sum(sizes), embeddings=_embeddings(model),
            block=elements(block.parameters()), largest=max(sizes),
            hidden=config.hidden_size, inner=config.intermediate_size, heads=heads,
            kv=(facts.get("num_key_value_heads") or heads) * size, blocks=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )  # fmt: skip


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device: shapes of all weights, without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _embeddings(model: PreTrainedModel) -> int:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
