"""Where a block's kept entries lie in a paged cache, so that attention reads them and nothing else.

All layers of vLLM share the block tables, and a layer may read fewer entries than others. A block that drops positions
is *compacted*: its kept entries lie one after the other from the first slot, and entries of later tokens follow them.
Keys are cached with RoPE applied and the order of entries does not change attention, so this is exact.

Words: a request has n transferred positions, of which a block keeps k; its *cut* is n - k. The entry of the token at
true position t >= n lies at place t - cut.

Shapes: R requests of a batch, T its tokens, M blocks of the longest table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_pl.plan import Retention


def kept_positions(rule: Retention, positions: int) -> Tensor:
    """True positions of the entries that a rule keeps, ascending, int64 [k]."""
    first, last = rule.counts(positions)
    return torch.cat([torch.arange(first), torch.arange(positions - last, positions)])


def slots_of(places: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Slots of some places of one request, whose table is `blocks` [M]."""
    return blocks[places // block_size] * block_size + places % block_size


def cut_lengths(seq_lens: Tensor, cuts: Tensor) -> Tensor:
    """Number of entries that a compacted layer reads for each request, [R]. Rows of padding stay at zero."""
    return torch.where(seq_lens > 0, seq_lens - cuts, seq_lens)


def cut_slots(
    slots: Tensor, starts: Tensor, seq_lens: Tensor, tables: Tensor, cuts: Tensor, block_size: int, tokens: int
) -> Tensor:
    """Slots that a compacted layer writes the batch's tokens to, in the shape and type of `slots`.

    Args:
        slots: those of a layer that is not compacted; what lies behind the first `tokens` is padding, and stays.
        starts: first token of each request and the end of the last one, [R + 1].
        seq_lens: entries of each request with the batch's own tokens, not compacted, [R].
        tables: block tables, [R, M].
        cuts: positions that the layer drops of each request, [R].
        block_size: slots of a block.
        tokens: number of tokens of the batch.
    """
    rows = torch.repeat_interleave(starts.diff().long(), output_size=tokens)
    token = torch.arange(tokens, device=slots.device)
    places = seq_lens[rows] - (starts[rows + 1] - token) - cuts[rows]
    blocks = tables[rows, places // block_size].long()
    out = slots.clone()
    out[:tokens] = blocks * block_size + places % block_size
    return out
