"""How many tokens a model's context holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def usable_context(config: Mapping[str, Any]) -> int:
    """Tokens of prompt and response together that a model serves with one fixed set of RoPE frequencies.

    `longrope` models (Phi-3 with 128k) switch to other frequencies for a whole sequence once it outgrows the original
    context. Keys that crossed the wire cannot be turned again, so their context ends there.

    Args:
        config: contents of a `config.json`.

    Raises:
        ValueError: the configuration does not tell its context.
    """
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise ValueError(f"The model configuration has `max_position_embeddings` {context!r}, not a number of tokens.")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        return min(context, original or context)
    return context
