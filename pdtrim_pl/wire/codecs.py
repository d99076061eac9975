"""Keys and values of one block as codes, and back: what decode sees is what these bytes say.

Rows are left-justified: the first `counts[row]` entries of a row count. Computation is in fp32, element by element, so
that the decoded values do not depend on how entries are laid out.

Shapes: B batch, K key/value heads, N entries of the longest row, D head dimension, G groups of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.plan.codec import CODE_BITS, Codec, Form
from pdtrim_pl.wire.quantise import TINY, Quantised, largest_step, quantise
from pdtrim_pl.wire.rotation import rotated

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
KEY_RANGES: Mapping[str, tuple[float, ...]] = {
    "int8": (1.0 + 2.0**-6,), "int4": (1.0,), "int3": (1.0,), "int2": (1.2, 1.0, 0.9, 0.8)
}  # fmt: skip
"""Ranges that the encoder tries, as shares of a group's own. In two bits the squared error is less where the ends of a
group are clipped. Keys are clipped less, because that shortens the largest of them and decode then finds less text."""
VALUE_RANGES: Mapping[str, tuple[float, ...]] = {**KEY_RANGES, "int2": (1.2, 1.0, 0.9, 0.8, 0.7, 0.6)}


@dataclass(frozen=True, eq=False)
class Stream:
    """Keys or values of one block, encoded."""

    form: Form
    rotate: bool
    raw: Tensor
    """`none` and `fp8`: the elements, [B, K, N, D]. Integer forms: the codes as they lie, uint8 [B, K, N, D]."""
    scales: Tensor | None = None
    """bf16 [B, K]: the scale of `fp8`, the largest step of the integer forms."""
    means: Tensor | None = None
    """bf16 [B, K, D], keys of integer forms alone: each channel's mean over the row."""
    steps: Tensor | None = None
    """uint8: keys [B, K, G, D], values [B, K, N]."""
    centres: Tensor | None = None
    """int8, shaped as `steps`."""
    group: int = 1
    """Positions that share a step and a centre."""
    exact: Tensor | None = None
    """The first positions of every row in the cache's own type, [B, K, E, D]; `raw` and the rest begin behind them."""

    def decoded(self) -> Tensor:
        """The elements, [B, K, E + N, D]; fp32, or the cache's own type under `none`."""
        if self.exact is not None and not self.raw.shape[2]:
            return self.exact
        rest = self._decoded()
        return rest if self.exact is None else torch.cat([self.exact.to(rest.dtype), rest], dim=2)

    def _decoded(self) -> Tensor:
        if self.form == "none":
            return self.raw
        assert self.scales is not None
        scales = self.scales.float()
        if self.form == "fp8":
            out = self.raw.float() * scales[..., None, None]
            return rotated(out) if self.rotate else out
        assert self.steps is not None
        assert self.centres is not None
        bits = CODE_BITS[self.form]
        if self.means is None:
            out = Quantised(self.raw, self.steps, self.centres).values(bits, scales[..., None])
        else:
            codes = _grouped(self.raw, self.group)  # [B, K, G, D, group]
            out = _ungrouped(Quantised(codes, self.steps, self.centres).values(bits, scales[..., None, None]))
            out = out[:, :, : self.raw.shape[2]] + self.means.float()[:, :, None]
        return rotated(out) if self.rotate else out


def encoded_keys(keys: Tensor, counts: Tensor, codec: Codec) -> Stream:
    """Keys [B, K, N, D] of which the first `counts` [B] of each row count."""
    return _behind_exact(keys, counts, codec, _encoded_keys)


def _encoded_keys(keys: Tensor, counts: Tensor, codec: Codec) -> Stream:
    form = codec.keys
    if form == "none":
        return Stream(form, False, keys)
    numbers = rotated(keys.float()) if codec.rotate_keys else keys.float()
    valid = _valid(counts, keys.shape[2])[:, None, :, None]  # [B, 1, N, 1]
    if form == "fp8":
        return _fp8(numbers, valid, codec.rotate_keys)
    totals = (numbers * valid).sum(dim=2)
    means = (totals / counts.clamp(min=1)[:, None, None]).to(torch.bfloat16)
    centred = _grouped(numbers - means.float()[:, :, None], codec.group)
    held = _grouped(valid.expand(-1, 1, -1, keys.shape[3]), codec.group)
    low, high = _bounds(centred, held)
    bits = CODE_BITS[form]
    scales = largest_step(low.flatten(2), high.flatten(2), bits)
    found = quantise(centred, held, low, high, scales.float()[..., None, None], bits, KEY_RANGES[form])
    codes = _ungrouped(found.codes)[:, :, : keys.shape[2]]
    return Stream(form, codec.rotate_keys, codes, scales, means, found.steps, found.centres, codec.group)


def encoded_values(values: Tensor, counts: Tensor, codec: Codec) -> Stream:
    """Values [B, K, N, D] of which the first `counts` [B] of each row count."""
    return _behind_exact(values, counts, codec, _encoded_values)


def _encoded_values(values: Tensor, counts: Tensor, codec: Codec) -> Stream:
    form = codec.values
    if form == "none":
        return Stream(form, False, values)
    numbers = rotated(values.float()) if codec.rotate_values else values.float()
    valid = _valid(counts, values.shape[2])[:, None, :, None]
    if form == "fp8":
        return _fp8(numbers, valid, codec.rotate_values)
    low, high = _bounds(numbers, valid)
    bits = CODE_BITS[form]
    scales = largest_step(low, high, bits)
    found = quantise(numbers, valid, low, high, scales.float()[..., None], bits, VALUE_RANGES[form])
    return Stream(form, codec.rotate_values, found.codes, scales, None, found.steps, found.centres)


def transferred(keys: Tensor, values: Tensor, counts: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """What decode sees of left-justified keys and values [B, K, N, D], in their own type.

    The gradient passes through as if nothing had been rounded (straight-through estimator), so that distillation can
    learn to live with the rounding.

    Args:
        keys: RoPE applied.
        values: as the block made them.
        counts: entries of each row that count, [B].
        codec: how they cross.
    """
    if not keys.shape[2]:
        return keys, values
    return (
        _straight_through(keys, lambda x: encoded_keys(x, counts, codec)),
        _straight_through(values, lambda x: encoded_values(x, counts, codec)),
    )


def _behind_exact(
    numbers: Tensor, counts: Tensor, codec: Codec, encode: Callable[[Tensor, Tensor, Codec], Stream]
) -> Stream:
    """The first positions as they are, and the others encoded."""
    if not codec.exact:
        return encode(numbers, counts, codec)
    exact, others = numbers[:, :, : codec.exact], numbers[:, :, codec.exact :]
    if not others.shape[2]:
        return Stream("none", False, others, exact=exact)
    return replace(encode(others, (counts - codec.exact).clamp(min=0), codec), exact=exact)


def _straight_through(numbers: Tensor, encode: Callable[[Tensor], Stream]) -> Tensor:
    with torch.no_grad():
        seen = encode(numbers.detach()).decoded().to(numbers.dtype)
    return _StraightThrough.apply(numbers, seen) if numbers.requires_grad else seen


class _StraightThrough(torch.autograd.Function):
    """Forward the rounded numbers, backward as if they were the numbers themselves."""

    @staticmethod
    def forward(ctx: object, numbers: Tensor, seen: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _fp8(numbers: Tensor, valid: Tensor, rotate: bool) -> Stream:
    largest = (numbers.abs() * valid).amax(dim=(2, 3))
    scales = (largest * (1 + 2.0**-7) / FP8_LARGEST).clamp_min(TINY).to(torch.bfloat16)  # never rounded below
    codes = (numbers / scales.float()[..., None, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    return Stream("fp8", rotate, codes, scales)


def _valid(counts: Tensor, entries: int) -> Tensor:
    return torch.arange(entries, device=counts.device)[None] < counts[:, None]


def _bounds(numbers: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest valid number of every group; zeros where a group has none."""
    low = numbers.masked_fill(~valid, torch.inf).amin(dim=-1)
    high = numbers.masked_fill(~valid, -torch.inf).amax(dim=-1)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _grouped(numbers: Tensor, group: int) -> Tensor:
    """[B, K, N, D] -> [B, K, G, D, group]; the last group is filled up with zeros."""
    missing = -numbers.shape[2] % group
    filled = F.pad(numbers, (0, 0, 0, missing))
    return filled.unflatten(2, (-1, group)).transpose(3, 4)


def _ungrouped(grouped: Tensor) -> Tensor:
    """The inverse of `_grouped`, with what it filled up."""
    return grouped.transpose(3, 4).flatten(2, 3)
