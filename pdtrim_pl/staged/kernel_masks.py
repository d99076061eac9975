"""Masks in the forms that FlexAttention and FlashAttention take.

Shapes: B batch, T new tokens, N entries after them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from pdtrim_pl.errors import UserError
from pdtrim_pl.staged.cache import Slots
from pdtrim_pl.staged.masks import fits, is_whole


def flex_mask(tokens: Slots, slots: Slots, window: int | None, dtype: torch.dtype) -> Any:
    """The `BlockMask` of what `attention_mask` says; it is computed in blocks, so that no mask [B, 1, T, N] is kept.

    On a GPU nothing of that size is built either. A CPU builds it once.
    """
    asked, held, valid = tokens.positions, slots.positions, slots.valid
    (rows, new), entries = asked.shape, held.shape[1]
    past = entries - new

    def seen(row: Tensor, head: Tensor, token: Tensor, entry: Tensor) -> Tensor:
        found = (held[row, entry] <= asked[row, token]) & valid[row, entry]
        if window is not None:
            found = found & (held[row, entry] > asked[row, token] - window)
        return found | (entry == token + past)

    compiled = asked.device.type == "cuda"
    return create_block_mask(seen, rows, None, new, entries, device=asked.device, _compile=compiled)


def flash_mask(tokens: Slots, slots: Slots, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """Which entries are valid, [B, N], or None where rows are whole.

    The kernel gets rows without their padding, and new token t of T sees the first N - T + t + 1 entries of the rest.
    This is the contract, whatever a policy keeps: valid entries lie in the order of their positions, and new tokens are
    last. But the kernel counts a window in entries, so no entry within a window may be missing.

    Raises:
        UserError: a window cuts a row of which a policy keeps only some positions.
    """
    if window is not None and slots.has_holes and not fits(slots, window):
        raise UserError(
            f"`attn_implementation: flash_attention_2` counts a block's window of {window} in entries of the cache, "
            "and this policy keeps only some positions of the prompt. Use `attn_implementation: sdpa` or "
            "`flex_attention`, or a policy that keeps all positions."
        )
    return None if is_whole(slots) else slots.valid


MaskOf = Callable[[Slots, Slots, int | None, torch.dtype], Any]
KERNEL_MASKS: Mapping[str, MaskOf] = MappingProxyType({"flex_attention": flex_mask, "flash_attention_2": flash_mask})
"""Attention implementation -> its mask; arguments as of `fused_mask`."""
