"""Adapters of model families: where a model keeps its blocks, and how a block projects keys and values.

Shapes: B batch, T tokens, H hidden, K key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.models import cuts as cut

RoPE = tuple[Tensor, Tensor]


class Architecture(ABC):
    """Adapter of one model family.

    A new family is a subclass that sets `kv_modules` and implements `keys_values`. All other defaults fit models that
    are built like Llama.
    """

    attention_name: ClassVar[str] = "self_attn"
    """Attribute of a block that holds its attention module."""
    kv_modules: ClassVar[tuple[str, ...]]
    """Names of the submodules of a block that project keys and values. A KV-only block uses only these."""
    last_projection: ClassVar[str | None] = None
    """Name of the linear submodule whose output a block adds to the residual stream last and unchanged. None if there
    is no such layer, or if a norm or a factor follows it. A local fit ends by solving it with least squares."""
    cuts: ClassVar[cut.Cuts] = cut.NO_CUTS
    """Where MLP channels and query heads can leave a block. Parts that are not named cannot leave."""
    mask_by_kind: ClassVar[bool] = False
    """Whether the model takes a dictionary of attention masks, one for each value in `layer_types`."""

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The list of decoder blocks that the model loops over."""
        blocks = model.base_model.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @abstractmethod
    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        """Project only keys and values from the hidden state that reaches a block.

        Args:
            block: the decoder block.
            hidden: hidden state that reaches the block, [B, T, H].
            rope: cosine and sine at the tokens' true positions, each [B, T, rotary dimensions].

        Returns:
            Keys with RoPE applied and values, each [B, K, T, D].
        """

    def kv_rows(self, block: nn.Module) -> slice | Tensor:
        """Which outputs of the linear layers among `kv_modules` become keys and values: all, or bool [O]."""
        return slice(None)

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Apply the model's head to final hidden states, [..., H] -> [..., V]."""
        head = model.get_output_embeddings()
        assert head is not None
        logits: Tensor = head(hidden)
        return logits

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        """Sliding window of the block at `position` of this model, in tokens; None if the block sees every token."""
        kind = config.layer_types[position]
        return config.sliding_window if kind == "sliding_attention" else None

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        """Whether PyTorch's fused attention can compute this model. It cannot soft-cap attention scores."""
        return True


class LlamaLine(Architecture):
    """Llama: input norm, separate projections, full RoPE, no windows."""

    kv_modules: ClassVar[tuple[str, ...]] = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        attention = block.get_submodule("self_attn")
        hidden = self.normed(block, hidden)
        keys, values = block.get_submodule("self_attn.k_proj")(hidden), block.get_submodule("self_attn.v_proj")(hidden)
        keys, values = (_by_head(x, _size(attention, "head_dim")) for x in self.flat_norm(attention, keys, values))
        return _rotate(self.head_norm(attention, keys).transpose(1, 2), rope), values.transpose(1, 2)

    def normed(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The input of the projections, [B, T, H]."""
        normed: Tensor = block.get_submodule("input_layernorm")(hidden)
        return normed

    def flat_norm(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Apply a norm over all key heads together, if the family has one; keys and values are [B, T, K*D]."""
        return keys, values

    def head_norm(self, attention: nn.Module, keys: Tensor) -> Tensor:
        """Apply a norm to each key head, if the family has one; keys are [B, T, K, D]."""
        return keys

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        return None


class Llama(LlamaLine):
    """Llama itself."""

    last_projection = "mlp.down_proj"
    cuts = cut.GATED_MLP_AND_HEADS


class Mistral(LlamaLine):
    """Mistral: one sliding window for every block, or none."""

    last_projection = "mlp.down_proj"
    cuts = cut.GATED_MLP_AND_HEADS

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        window: int | None = config.sliding_window
        return window


class Qwen2(LlamaLine):
    """Qwen2: `layer_types` says which blocks have a sliding window."""

    last_projection: ClassVar[str | None] = "mlp.down_proj"
    cuts = cut.GATED_MLP_AND_HEADS
    mask_by_kind = True
    window = Architecture.window


class Qwen3(Qwen2):
    """Qwen3: as Qwen2, with a norm on each key head."""

    kv_modules = (*LlamaLine.kv_modules, "self_attn.k_norm")

    def head_norm(self, attention: nn.Module, keys: Tensor) -> Tensor:
        normed: Tensor = attention.get_submodule("k_norm")(keys)
        return normed


def _softcapped(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Gemma2(Qwen2):
    """Gemma 2: sliding windows by `layer_types`, a norm after the MLP, soft-capped attention scores and logits."""

    last_projection = None

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return _softcapped(model.config, super().logits(model, hidden))

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        return False  # transformers refuses it for the whole family


class Gemma3(Qwen3):
    """Gemma 3 (text): as Gemma 2, with a norm on each key head."""

    last_projection = None

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return _softcapped(model.config, super().logits(model, hidden))

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        return config.attn_logit_softcapping is None  # sdpa would silently ignore the cap


class Olmo2(LlamaLine):
    """OLMo 2: norms after attention and MLP instead of before them, one over all key heads and one over all queries."""

    cuts = cut.GATED_MLP
    kv_modules = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")

    def normed(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return hidden

    def flat_norm(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return attention.get_submodule("k_norm")(keys), values


class Phi3(Mistral):
    """Phi-3: one fused projection for queries, keys and values; partial RoPE in some sizes."""

    kv_modules = ("input_layernorm", "self_attn.qkv_proj")
    cuts = cut.FUSED_MLP

    def kv_rows(self, block: nn.Module) -> slice | Tensor:
        attention = block.get_submodule("self_attn")
        return slice(-2 * _size(attention, "num_key_value_heads") * _size(attention, "head_dim"), None)

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        size = _size(block.get_submodule("self_attn"), "head_dim")
        # Run the whole module, queries included: sharded weights are gathered only while their module runs.
        fused = block.get_submodule("self_attn.qkv_proj")(self.normed(block, hidden))
        keys, values = fused[..., self.kv_rows(block)].chunk(2, dim=-1)
        keys, values = _by_head(keys, size), _by_head(values, size)
        return _rotate(keys.transpose(1, 2), rope), values.transpose(1, 2)


class GPTNeoX(LlamaLine):
    """GPT-NeoX: queries, keys and values interleaved by head in one projection, partial RoPE."""

    attention_name = "attention"
    kv_modules = ("input_layernorm", "attention.query_key_value")
    last_projection = "mlp.dense_4h_to_h"
    cuts = cut.NEOX_MLP

    def kv_rows(self, block: nn.Module) -> slice | Tensor:
        size = _size(block.get_submodule("attention"), "head_size")
        outputs = block.get_submodule("attention.query_key_value").get_parameter("weight").shape[0]
        return torch.arange(outputs) % (3 * size) >= size

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        size = _size(block.get_submodule("attention"), "head_size")
        fused = block.get_submodule("attention.query_key_value")(self.normed(block, hidden))
        _, keys, values = _by_head(fused, 3 * size).transpose(1, 2).chunk(3, dim=-1)
        return _rotate(keys, rope), values


class Granite(LlamaLine):
    """Granite: as Llama, with scaled logits and scaled additions to the residual stream."""

    cuts = cut.GATED_MLP_AND_HEADS

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return super().logits(model, hidden) / model.config.logits_scaling


class Starcoder2(Mistral):
    """StarCoder 2: as Mistral, with another name for the last projection."""

    last_projection = "mlp.c_proj"
    cuts = cut.PLAIN_MLP_AND_HEADS


ARCHITECTURES: MappingProxyType[str, Architecture] = MappingProxyType(
    {
        "llama": Llama(), "mistral": Mistral(), "qwen2": Qwen2(), "qwen3": Qwen3(), "gemma2": Gemma2(),
        "gemma3_text": Gemma3(), "phi3": Phi3(), "gpt_neox": GPTNeoX(), "olmo2": Olmo2(), "granite": Granite(),
        "starcoder2": Starcoder2(),
    }
)  # fmt: skip


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The package's adapter for a model family.

    Raises:
        UserError: there is none. The message says what an adapter must supply.
    """
    check_model_type(config.model_type)
    return ARCHITECTURES[config.model_type]


def check_model_type(model_type: str) -> None:
    """Refuse a model family for which the package has no adapter.

    Raises:
        UserError: there is none. The message says what an adapter must supply.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"`model` is of type {model_type!r}, which has no adapter. Supported: {', '.join(ARCHITECTURES)}. "
            "For another decoder-only model name one in YAML, `model.architecture: {class_path: my_module.MyFamily}` "
            "(in Python `StagedCausalLM(model, architecture=...)`): a subclass of pdtrim_pl.staged.Architecture that "
            "supplies `blocks` (the ModuleList of decoder blocks), `attention_name`, `kv_modules` and `keys_values` "
            "(keys after RoPE and values of one block), `logits` (the head), `window` (a block's sliding window), "
            "`last_projection` (a block's last linear layer, or None) and `cuts` (where its channels and heads are); "
            "see docs/extending.md."
        )


def _size(module: nn.Module, name: str) -> int:
    """An integer attribute of an attention module."""
    size = getattr(module, name)
    assert isinstance(size, int)
    return size


def _by_head(x: Tensor, size: int) -> Tensor:
    """Split the last dimension into heads: [..., heads * size] -> [..., heads, size]."""
    return x.view(*x.shape[:-1], -1, size)


def _rotate(keys: Tensor, rope: RoPE) -> Tensor:
    """Rotary embedding of keys [B, K, T, D] on the first rotary dimensions (arXiv 2104.09864), half-split layout."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    turned, kept = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned
