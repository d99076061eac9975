"""How a decoder block of transformers wants to be called, learned from the block: its argument names may change.

Shapes: B batch, T new tokens, N cached entries.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn
from transformers import Cache

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import RoPE

_NO_CACHE = {
    "attention_mask",
    "cache_position",
    "output_attentions",
    "position_embeddings",
    "position_ids",
    "use_cache",
}
"""Arguments of blocks that are known to be something else. Read only where nothing is annotated as a cache."""


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with: the model's own arguments, with our mask and our cache among them."""

    cache: str
    """Name of the argument that takes the cache."""

    @classmethod
    def of(cls, block: nn.Module) -> BlockCall:
        """Learn it from the signature of the block's `forward`.

        The cache is the argument annotated as a transformers `Cache`. Where none is annotated so, it is the only
        argument without annotation that is not known to be something else.

        Raises:
            UserError: the block takes no cache that way; names the block's class and its arguments.
        """
        _, *arguments = inspect.signature(block.forward).parameters.values()  # the first is the hidden state
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
        found = [a.name for a in named if _is_cache(a.annotation)]
        found = found or [a.name for a in named if a.annotation is a.empty and a.name not in _NO_CACHE]
        if len(found) != 1:
            names = ", ".join(a.name for a in named) or "none by name"
            raise UserError(
                f"`model` has blocks of class {type(block).__name__}, and it is not known how their `forward` takes "
                f"the cache: {len(found)} of its arguments ({names}) look like one. Annotate the one that takes it "
                "with `transformers.Cache | None`."
            )
        return cls(found[0])

    def arguments(
        self, given: Mapping[str, Any], placeholder: Tensor, mask: Tensor | None, cache: object
    ) -> dict[str, Any]:
        """The arguments of one call.

        Args:
            given: keyword arguments that the model passed.
            placeholder: the mask that the model was given; blocks get it as it is.
            mask: what this block gets in its place, [B, 1, T, N] or None.
            cache: the past of this block; it is updated by the call.

        Raises:
            UserError: the model did not pass the placeholder on, so that its own mask would decide.
        """
        masks = [name for name, value in given.items() if value is placeholder]
        if not masks:
            raise UserError(
                "`model` does not pass a 4D attention mask on to its blocks by keyword. Give `architecture` an adapter "
                "whose blocks take it so."
            )
        return {**given, **dict.fromkeys(masks, mask), self.cache: cache}


def rope_among(given: Mapping[str, Any]) -> RoPE:
    """Cosine and sine that a model passed to its block: the one pair of tensors among the arguments."""
    for value in given.values():
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            return value
    raise UserError(
        f"`model` passes no pair of cosine and sine to its blocks, only {', '.join(given)}. Blocks that prefill drops "
        "and decode keeps need it for their keys: use `relation: nested` or `unified`."
    )


def _is_cache(annotation: object) -> bool:
    if isinstance(annotation, str):  # of a module that postpones annotations
        return re.search(r"\b(Dynamic|Static)?Cache\b", annotation) is not None
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in (annotation, *get_args(annotation)))
