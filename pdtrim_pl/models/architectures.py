"""Where each model family keeps its blocks, and how a block makes keys and values. The only place that knows families.

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

RoPE = tuple[Tensor, Tensor]


class Architecture(ABC):
    """What the contract of one request needs to know about a model family.

    A new family is a subclass that names `kv_modules` and writes `keys_values`; the rest has the defaults of the
    Llama line.
    """

    attention_name: ClassVar[str] = "self_attn"
    """Attribute of a block that holds its attention module."""
    kv_modules: ClassVar[tuple[str, ...]]
    """Submodules of a block that a KV-only block needs, in the block's own naming."""
    last_projection: ClassVar[str | None] = None
    """Linear submodule of a block whose output, as it is, is added to the residual stream last; None where there is
    none, or a norm or a factor comes behind it. Local fits end with its least-squares solution."""
    mask_by_kind: ClassVar[bool] = False
    """Whether the model takes a dictionary of masks by `layer_types`."""

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The list of decoder blocks the model loops over."""
        blocks = model.base_model.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @abstractmethod
    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        """Project keys and values, and nothing else, from the hidden state that reaches a block.

        Args:
            block: the decoder block.
            hidden: hidden state that reaches the block, [B, T, H].
            rope: cosine and sine at the tokens' true positions, each [B, T, rotary dimensions].

        Returns:
            Keys with RoPE applied and values, each [B, K, T, D].
        """

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """The model's own head on final hidden states, [..., H] -> [..., V]."""
        head = model.get_output_embeddings()
        assert head is not None
        logits: Tensor = head(hidden)
        return logits

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        """Sliding window of the block at `position` of this model, in tokens; None where it sees everything."""
        kind = config.layer_types[position]
        return config.sliding_window if kind == "sliding_attention" else None

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        """Whether PyTorch's fused attention computes this model (not with soft-capped attention scores)."""
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
        """What the projections read, [B, T, H]."""
        normed: Tensor = block.get_submodule("input_layernorm")(hidden)
        return normed

    def flat_norm(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A norm over all heads of the keys at once, [B, T, K*D]."""
        return keys, values

    def head_norm(self, attention: nn.Module, keys: Tensor) -> Tensor:
        """A norm over each head of the keys, [B, T, K, D]."""
        return keys

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        return None


class Llama(LlamaLine):
    """Llama itself."""

    last_projection = "mlp.down_proj"


class Mistral(LlamaLine):
    """Mistral: one sliding window for every block, or none."""

    last_projection = "mlp.down_proj"

    def window(self, config: PreTrainedConfig, position: int) -> int | None:
        window: int | None = config.sliding_window
        return window


class Qwen2(LlamaLine):
    """Qwen2: a window for the blocks that `layer_types` says."""

    last_projection: ClassVar[str | None] = "mlp.down_proj"
    mask_by_kind = True
    window = Architecture.window


class Qwen3(Qwen2):
    """Qwen3 and Gemma 3: as Qwen2, and each key head is normed."""

    kv_modules = (*LlamaLine.kv_modules, "self_attn.k_norm")

    def head_norm(self, attention: nn.Module, keys: Tensor) -> Tensor:
        normed: Tensor = attention.get_submodule("k_norm")(keys)
        return normed


def _softcapped(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Gemma2(Qwen2):
    """Gemma 2: windows by `layer_types`, a norm behind the MLP, soft-capped scores and logits."""

    last_projection = None

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return _softcapped(model.config, super().logits(model, hidden))

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        return False  # transformers refuses it for the whole family


class Gemma3(Qwen3):
    """Gemma 3 (text): normed key heads, else as Gemma 2."""

    last_projection = None

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return _softcapped(model.config, super().logits(model, hidden))

    def supports_sdpa(self, config: PreTrainedConfig) -> bool:
        return config.attn_logit_softcapping is None  # else it would leave the cap out and say nothing


class Olmo2(LlamaLine):
    """OLMo 2: no input norm but one behind attention and MLP, and one norm over all key heads."""

    kv_modules = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")

    def normed(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return hidden

    def flat_norm(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return attention.get_submodule("k_norm")(keys), values


class Phi3(Mistral):
    """Phi-3: one fused projection for queries, keys and values; partial RoPE in some sizes."""

    kv_modules = ("input_layernorm", "self_attn.qkv_proj")

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        attention = block.get_submodule("self_attn")
        size = _size(attention, "head_dim")
        width = _size(attention, "num_key_value_heads") * size
        # The whole module, queries too: sharded weights are there only while a module runs.
        fused = block.get_submodule("self_attn.qkv_proj")(self.normed(block, hidden))
        keys, values = fused[..., -2 * width :].split(width, dim=-1)
        keys, values = _by_head(keys, size), _by_head(values, size)
        return _rotate(keys.transpose(1, 2), rope), values.transpose(1, 2)


class GPTNeoX(LlamaLine):
    """GPT-NeoX: queries, keys and values interleaved by head in one projection, partial RoPE."""

    attention_name = "attention"
    kv_modules = ("input_layernorm", "attention.query_key_value")
    last_projection = "mlp.dense_4h_to_h"

    def keys_values(self, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
        size = _size(block.get_submodule("attention"), "head_size")
        fused = block.get_submodule("attention.query_key_value")(self.normed(block, hidden))
        _, keys, values = _by_head(fused, 3 * size).transpose(1, 2).chunk(3, dim=-1)
        return _rotate(keys, rope), values


class Granite(LlamaLine):
    """Granite: the Llama line with scaled logits and scaled additions to the residual stream."""

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        return super().logits(model, hidden) / model.config.logits_scaling


class Starcoder2(Mistral):
    """StarCoder 2: as Mistral, with other names in the MLP."""

    last_projection = "mlp.c_proj"


ARCHITECTURES: MappingProxyType[str, Architecture] = MappingProxyType(
    {
        "llama": Llama(),
        "mistral": Mistral(),
        "qwen2": Qwen2(),
        "qwen3": Qwen3(),
        "gemma2": Gemma2(),
        "gemma3_text": Gemma3(),
        "phi3": Phi3(),
        "gpt_neox": GPTNeoX(),
        "olmo2": Olmo2(),
        "granite": Granite(),
        "starcoder2": Starcoder2(),
    }
)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The adapter of a model family.

    Raises:
        UserError: no adapter; says what one must supply.
    """
    check_model_type(config.model_type)
    return ARCHITECTURES[config.model_type]


def check_model_type(model_type: str) -> None:
    """Refuse a model family without an adapter.

    Raises:
        UserError: saying what one must supply.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"`model` is of type {model_type!r}, which has no adapter. Supported: {', '.join(ARCHITECTURES)}. "
            "For another decoder-only model name one in YAML, `model.architecture: {class_path: my_module.MyFamily}` "
            "(in Python `StagedCausalLM(model, architecture=...)`): a subclass of pdtrim_pl.staged.Architecture that "
            "supplies `blocks` (the ModuleList of decoder blocks), `attention_name`, `kv_modules` and `keys_values` "
            "(keys after RoPE and values of one block), `logits` (the head), `window` (a block's sliding window) and "
            "`last_projection` (a block's last linear layer, or None); see docs/extending.md."
        )


def _size(module: nn.Module, name: str) -> int:
    """A number that an attention module keeps as an attribute."""
    size = getattr(module, name)
    assert isinstance(size, int)
    return size


def _by_head(x: Tensor, size: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, size)


def _rotate(keys: Tensor, rope: RoPE) -> Tensor:
    """Rotary embedding of keys [B, K, T, D] on the first rotary dimensions (arXiv 2104.09864), half-split layout."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    turned, kept = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned
