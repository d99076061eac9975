"""Encode the keys and values of one block, and decode them again. Decode attends to the decoded numbers.

Rows are left-justified: the first `counts[row]` entries of a row are valid. All computation is element by element in
fp32, so the decoded numbers do not depend on the memory layout of the entries.

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
"""Ranges that the encoder tries, as shares of a group's range. With two bits, clipping the ends gives less error. Keys
are clipped less, because clipping makes large keys smaller, and decode then finds less text."""
VALUE_RANGES: Mapping[str, tuple[float, ...]] = {**KEY_RANGES, "int2": (1.2, 1.0, 0.9, 0.8, 0.7, 0.6)}


@dataclass(frozen=True, eq=False)
class Stream:
    """Keys or values of one block, encoded."""

    form: Form
    rotate: bool
    raw: Tensor
    """[B, K, N, D]. `none` and `fp8`: the elements. Integer forms: the codes in uint8, one code a byte."""
    scales: Tensor | None = None
    """bf16 [B, K]: the scale of `fp8`, the largest step of the integer forms."""
    means: Tensor | None = None
    """bf16 [B, K, D], only for keys of integer forms: the mean of each channel over the row."""
    steps: Tensor | None = None
    """uint8: keys [B, K, G, D], values [B, K, N]."""
    centres: Tensor | None = None
    """int8, shaped as `steps`."""
    group: int = 1
    """Positions that share a step and a centre."""
    exact: Tensor | None = None
    """The first positions of every row, not rounded, [B, K, E, D]; `raw` and all parameters begin after them."""

    def decoded(self) -> Tensor:
        """Decode the elements, [B, K, E + N, D]; fp32, or the element type of the cache under `none`."""
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
    """Encode keys [B, K, N, D]; the first `counts[row]` entries of each row are valid."""
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
    in_use = _grouped(valid.expand(-1, 1, -1, keys.shape[3]), codec.group)
    low, high = _bounds(centred, in_use)
    bits = CODE_BITS[form]
    scales = largest_step(low.flatten(2), high.flatten(2), bits)
    found = quantise(centred, in_use, low, high, scales.float()[..., None, None], bits, KEY_RANGES[form])
    codes = _ungrouped(found.codes)[:, :, : keys.shape[2]]
    return Stream(form, codec.rotate_keys, codes, scales, means, found.steps, found.centres, codec.group)


def encoded_values(values: Tensor, counts: Tensor, codec: Codec) -> Stream:
    """Encode values [B, K, N, D]; the first `counts[row]` entries of each row are valid."""
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
    """Encode and decode keys and values: the result is what decode attends to, [B, K, N, D] each, in their own type.

    The gradient passes unchanged, as if nothing were rounded (straight-through estimator). So distillation can train
    the model for rounded keys and values.

    Args:
        keys: keys with RoPE applied, left-justified, [B, K, N, D].
        values: values, left-justified, [B, K, N, D].
        counts: number of valid entries of each row, [B].
        codec: the codec of the block.
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
    """Encode all but the first `codec.exact` positions."""
    if not codec.exact:
        return encode(numbers, counts, codec)
    exact, others = numbers[:, :, : codec.exact], numbers[:, :, codec.exact :]
    if not others.shape[2]:
        return Stream("none", False, others, exact=exact)
    return replace(encode(others, (counts - codec.exact).clamp(min=0), codec), exact=exact)


def _straight_through(numbers: Tensor, encode: Callable[[Tensor], Stream]) -> Tensor:
    with torch.no_grad():
        rounded = encode(numbers.detach()).decoded().to(numbers.dtype)
    return _StraightThrough.apply(numbers, rounded) if numbers.requires_grad else rounded


class _StraightThrough(torch.autograd.Function):
    """Returns the rounded numbers, and passes their gradient on to the original numbers unchanged."""

    @staticmethod
    def forward(ctx: object, numbers: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _fp8(numbers: Tensor, valid: Tensor, rotate: bool) -> Stream:
    largest = (numbers.abs() * valid).amax(dim=(2, 3))
    # The factor makes up for a scale that bf16 rounds down.
    scales = (largest * (1 + 2.0**-7) / FP8_LARGEST).clamp_min(TINY).to(torch.bfloat16)
    codes = (numbers / scales.float()[..., None, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    return Stream("fp8", rotate, codes, scales)


def _valid(counts: Tensor, entries: int) -> Tensor:
    """Which of the `entries` of each row are valid, bool [B, entries]."""
    return torch.arange(entries, device=counts.device)[None] < counts[:, None]


def _bounds(numbers: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest valid number of every group; zeros for a group without a valid number."""
    low = numbers.masked_fill(~valid, torch.inf).amin(dim=-1)
    high = numbers.masked_fill(~valid, -torch.inf).amax(dim=-1)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _grouped(numbers: Tensor, group: int) -> Tensor:
    """Cut positions into groups: [B, K, N, D] -> [B, K, G, D, group]. The last group is padded with zeros."""
    missing = -numbers.shape[2] % group
    filled = F.pad(numbers, (0, 0, 0, missing))
    return filled.unflatten(2, (-1, group)).transpose(3, 4)


def _ungrouped(grouped: Tensor) -> Tensor:
    """The inverse of `_grouped`, with its padding: [B, K, G, D, group] -> [B, K, G * group, D]."""
    return grouped.transpose(3, 4).flatten(2, 3)
