"""How many tokens a model's context holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_pl.errors import UserError


def usable_context(config: Mapping[str, Any]) -> int:
    """Tokens of prompt and response together that a model serves with one fixed set of RoPE frequencies.

    YaRN stretches the original context by its factor once and for all, and its context is their product, whether or not
    `max_position_embeddings` was raised with them (the model cards of Qwen leave it). `longrope` models (Phi-3 with
    128k) switch to other frequencies for a whole sequence once it outgrows the original context. Keys that crossed the
    wire cannot be turned again, so their context ends there.

    Args:
        config: contents of a `config.json`.

    Raises:
        UserError: the configuration does not tell its context.
    """
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise UserError(f"The model configuration has `max_position_embeddings` {context!r}, not a number of tokens.")
    # The order of transformers: the older spelling wins where a file has both, and so does the outer original context.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # one set a kind of layer; a sliding window never looks far
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
