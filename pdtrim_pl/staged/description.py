"""What plans and policies record about a model: its name, its number of blocks and the shape of its KV cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pdtrim_pl.plan import KVShape, ModelRef


def reference_to(model: PreTrainedModel, name_or_path: str | None = None) -> ModelRef:
    """The `ModelRef` by which plans refer to this model; `name_or_path` replaces the name that the model carries."""
    config = model.config.to_dict()
    heads = config.get("num_attention_heads")
    return ModelRef(
        name_or_path or str(model.name_or_path), config["model_type"], config["num_hidden_layers"],
        channels=config.get("intermediate_size"), heads=heads, kv_heads=config.get("num_key_value_heads") or heads,
    )  # fmt: skip


def kv_shape_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> KVShape:
    """Heads, head dimension and element type of a model's KV cache; the model's own element type by default."""
    config = model.config.to_dict()
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    return KVShape(kv_heads, size, str(dtype or model.dtype).removeprefix("torch."))
