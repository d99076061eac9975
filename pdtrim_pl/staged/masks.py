"""The attention mask of one pass. Fused attention gets none, or no dense one, where every row is whole.

Shapes: B batch, T new tokens, N entries after them, C new tokens in a chunk, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from pdtrim_pl.staged.cache import Slots, attention_mask

CHUNK = 1024
"""New tokens in a chunk on a CPU. Small chunks are slower in backward: each adds to the gradients of all entries."""
DENSE = 2**20
"""Padded rows get a boolean mask of up to so many elements: one call for all rows is then faster than one for each."""


class LowerRight(Tensor):
    """Says that new token t of T sees the first N - T + t + 1 entries. Give it to fused attention as its `attn_mask`.

    On a GPU, PyTorch's `causal_lower_right` computes it, with the flash kernel where that takes the inputs. A CPU has
    no such kernel: there the new tokens are computed in chunks. A chunk takes only the entries that its last token
    sees, and its mask is the corner of one mask [C, N] that all chunks and blocks share, which is the content of this
    tensor.

    Rows with padding before their first token are computed one by one, without that padding. Its outputs are 0.
    """

    starts: Sequence[int] = ()
    """Number of padded entries before the first token of each row; empty if there are none."""

    @classmethod
    def of(
        cls, new: int, entries: int, dtype: torch.dtype, device: torch.device, starts: Sequence[int] = ()
    ) -> LowerRight:
        """The mask of `new` tokens T over `entries` N; `dtype` is the element type that attention computes in."""
        rows = 0 if device.type == "cuda" or new == entries else min(new, CHUNK)
        hidden = torch.ones(rows, entries, dtype=torch.bool, device=device).triu_(entries - rows + 1)
        mask = torch.zeros(rows, entries, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        made = mask.as_subclass(cls)
        made.starts = starts
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute fused attention. Every other function sees an ordinary tensor, and a copy keeps `starts`."""
        if func is scaled_dot_product_attention:
            return cls._attend(*args, **(kwargs or {}))
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, cls) and args and isinstance(args[0], cls):
            out.starts = args[0].starts
        return out

    @staticmethod
    @torch.compiler.disable
    def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: LowerRight, **settings: Any) -> Tensor:
        """Attention of queries [B, H, T, D] over keys and values [B, H, N, D]."""
        device = query.device.type
        if torch.is_autocast_enabled(device):  # autocast knows fused attention, but not the kernels of a bias
            query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
        mask = attn_mask.as_subclass(Tensor).to(query.dtype)
        if not attn_mask.starts:
            return _whole_rows(query, key, value, mask, settings)
        past, outputs = key.shape[-2] - query.shape[-2], list[Tensor]()
        for start, *row in zip(attn_mask.starts, query.split(1), key.split(1), value.split(1), strict=True):
            padded = max(start - past, 0)
            asked, keys, values = row[0][..., padded:, :], row[1][..., start:, :], row[2][..., start:, :]
            outputs.append(pad(_whole_rows(asked, keys, values, mask, settings), (0, 0, padded, 0)))
        return torch.cat(outputs)


def _whole_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: Mapping[str, Any]) -> Tensor:
    new, entries = query.shape[-2], key.shape[-2]
    if new in (1, entries):
        return scaled_dot_product_attention(query, key, value, **{**settings, "is_causal": new > 1})
    if query.device.type == "cuda":
        bias = causal_lower_right(new, entries)
        out: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=bias, **settings)
        return out
    parts = list[Tensor]()
    for chunk in query.split(len(mask), dim=-2):
        rows, new = chunk.shape[-2], new - chunk.shape[-2]
        seen = entries - new
        keys, values, corner = key[..., :seen, :], value[..., :seen, :], mask[-rows:, -seen:]
        parts.append(scaled_dot_product_attention(chunk, keys, values, attn_mask=corner, **settings))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def fused_mask(tokens: Slots, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """The mask for fused attention: a `LowerRight`, or None, where rows are whole; else boolean, [B, 1, T, N].

    Rows are whole if they have padding only after their last token, and no window cuts them. Rows that are padded
    before their first token too are whole without that padding: several new tokens get a `LowerRight` if a boolean
    mask would have more than `DENSE` elements. What a padded position then computes is arbitrary, and no other
    position sees it.

    Args:
        tokens: the new tokens, [B, T], in order.
        slots: all entries, [B, N]; the new tokens are the last, and no other is at a later position.
        window: entries that a token may see at most, by position; None for all.
        dtype: element type of the hidden states.
    """
    (rows, new), entries = tokens.positions.shape, slots.positions.shape[1]
    if window is not None and not fits(slots, window):
        return attention_mask(tokens, slots, window)
    starts: Sequence[int] = ()
    if is_whole(slots):
        if new in (1, entries):
            return None
    else:
        found = None if new == 1 or rows * new * entries <= DENSE else _starts(slots)
        if found is None:
            return attention_mask(tokens, slots, window)
        starts = found
    device = tokens.positions.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return LowerRight.of(new, entries, dtype, device, starts)


def additive_mask(tokens: Slots, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor:
    """The mask for eager attention, which adds it to the scores: 0 or a very low number, [B, 1, T, N]."""
    seen = attention_mask(tokens, slots, window)
    lowest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(seen.logical_not_(), lowest)


def is_whole(slots: Slots) -> bool:
    """Whether every row has padding only after its last token."""
    if slots.rows is not None:
        return slots.rows.are_whole
    return bool((slots.valid[:, :-1] | ~slots.valid[:, 1:]).all())


def fits(slots: Slots, window: int) -> bool:
    """Whether a window cuts no row."""
    if slots.rows is not None:
        return slots.rows.fit_into(window)
    return bool((slots.positions.amax(dim=1) - slots.positions.amin(dim=1) < window).all())


def _starts(slots: Slots) -> Sequence[int] | None:
    """Number of padded entries before the first token of each row; None if a row has a gap behind it."""
    if slots.rows is not None:
        return slots.rows.starts if slots.rows.have_no_gap else None
    before = slots.valid.cumsum(dim=1) == 0
    if not (slots.valid[:, :-1] | before[:, :-1] | ~slots.valid[:, 1:]).all():
        return None
    starts: list[int] = (before.sum(dim=1) % slots.valid.shape[1]).tolist()  # a row of padding alone counts as whole
    return starts
