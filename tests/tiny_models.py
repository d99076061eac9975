"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING: dict[str, Any] = {"sliding_window": 5}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SLIDING,
    "qwen2": {**_SLIDING, "use_sliding_window": True, "layered": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8, "layered": True},
    "gemma3_text": {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8, "layered": True},
    "phi3": _SLIDING,
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
    "starcoder2": _SLIDING,
}
TIED: dict[str, Any] = {"vocab_size": 259, "tie_word_embeddings": True, "initializer_range": 0.1}
"""Settings for runs in several processes: the ids of the tiny tokenizer, and one tensor for embeddings and head."""
FAMILIES: tuple[str, ...] = tuple(_OWN)


def tiny_model(family: str, *, blocks: int = 4, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode; every second block of the layered families has a sliding window of 5."""
    settings = {**_COMMON, **_OWN[family], "num_hidden_layers": blocks, **overrides}
    if settings.pop("layered", False):
        settings["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(blocks)]
    if settings["num_key_value_heads"] is None:
        del settings["num_key_value_heads"]
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def saved_tiny_model(folder: Path, tokenizer_dir: Path, family: str = "llama", **settings: Any) -> Path:
    """Write a `tiny_model` with a tokenizer into a folder; returns the folder."""
    tiny_model(family, **settings).save_pretrained(folder)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    return folder
