"""The number of tokens that a model's context holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_pl.errors import UserError


def usable_context(config: Mapping[str, Any]) -> int:
    """Maximum number of tokens, prompt and response together, that a model serves with one set of RoPE frequencies.

    The context of a YaRN model is its original context times its factor. `max_position_embeddings` may be lower: the
    model cards of Qwen do not raise it. A `longrope` model (Phi-3 with 128k) changes the frequencies of the whole
    sequence when the sequence exceeds the original context. Keys that were already sent cannot be rotated again, so
    the usable context of such a model is the original one.

    Args:
        config: contents of a `config.json`.

    Raises:
        UserError: `max_position_embeddings` is missing or not a number.
    """
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise UserError(f"The model configuration has `max_position_embeddings` {context!r}, not a number of tokens.")
    # Same order as in transformers: `rope_scaling`, the older key, comes before `rope_parameters`, and the original
    # context at the top of the file before the one among the RoPE parameters.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # some models have a set for each layer type; sliding windows are short
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("yarn", "longrope", "su"):
        return context
    original: int = (
        config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    )
    if kind == "yarn":
        factor = rope.get("factor")
        return context if factor is None else int(original * factor)
    return min(context, original)
