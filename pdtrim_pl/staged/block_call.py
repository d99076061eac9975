"""Call a decoder block of transformers. Its argument names differ between releases, so its signature is read.

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
"""Block arguments that are never the cache. Used only if no argument is annotated as a cache."""


@dataclass(frozen=True)
class BlockCall:
    """How to call one block: with the model's own arguments, our mask and our cache."""

    cache: str
    """Name of the argument that takes the cache."""

    @classmethod
    def of(cls, block: nn.Module) -> BlockCall:
        """Read the name of the cache argument from the signature of the block's `forward`.

        The cache is the argument annotated as a transformers `Cache`. If no argument is annotated so, the cache is the
        only argument that has no annotation and is not in `_NO_CACHE`.

        Raises:
            UserError: no argument looks like the cache, or several do. The message names the block's class and its
                arguments.
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
            given: keyword arguments that the model passed to the block.
            placeholder: the mask that we passed to the model. The model passes it on to its blocks unchanged.
            mask: the mask that replaces the placeholder for this block, [B, 1, T, N] or None.
            cache: the past of this block. The call adds the new keys and values to it.

        Raises:
            UserError: the placeholder is not among the arguments, so the model would use a mask of its own.
        """
        masks = [name for name, value in given.items() if value is placeholder]
        if not masks:
            raise UserError(
                "`model` does not pass a 4D attention mask on to its blocks by keyword. Give `architecture` an adapter "
                "whose blocks take it so."
            )
        return {**given, **dict.fromkeys(masks, mask), self.cache: cache}


def rope_among(given: Mapping[str, Any]) -> RoPE:
    """Cosine and sine that a model passed to its block: the first pair of tensors among the arguments.

    Raises:
        UserError: there is no such pair.
    """
    for value in given.values():
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            return value
    raise UserError(
        f"`model` passes no pair of cosine and sine to its blocks, only {', '.join(given)}. Blocks that prefill drops "
        "and decode keeps need it for their keys: use `relation: nested` or `unified`."
    )


def _is_cache(annotation: object) -> bool:
    if isinstance(annotation, str):  # the block's module has `from __future__ import annotations`
        return re.search(r"\b(Dynamic|Static)?Cache\b", annotation) is not None
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in (annotation, *get_args(annotation)))
