"""Asymmetric rounding of groups of numbers to a few bits. Each group has a step and a centre of one byte each.

A code decodes to `step * (code - (2**b - 1) / 2 + centre * 2**b / 64)`. A step is `largest * (16 + m) * 2**(-4 - e)`
with `m = byte % 16` and `e = byte // 16`, at most `largest * 31 / 16`. A centre is a signed byte, in 64ths of the range
of codes.

Shapes: the last dimension, n, holds the numbers of one group; [...] are the groups. `largest` broadcasts over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 1.2
"""The widest range that an encoder may try, as a share of a group's range."""
TINY = 2.0**-100


@dataclass(frozen=True, eq=False)
class Quantised:
    """Groups of codes, with the step and the centre of each group."""

    codes: Tensor
    """uint8 [..., n]."""
    steps: Tensor
    """uint8 [...]."""
    centres: Tensor
    """int8 [...]."""

    def values(self, bits: int, largest: Tensor) -> Tensor:
        """Decode the numbers, fp32 [..., n].

        Args:
            bits: bits of a code.
            largest: the largest step, fp32; broadcasts over the groups [...].
        """
        offset = self.centres.float() * (2**bits / 64) - (2**bits - 1) / 2
        return (self.codes.float() + offset[..., None]) * step_of(self.steps, largest)[..., None]


def step_of(steps: Tensor, largest: Tensor) -> Tensor:
    """Decode steps from their bytes, fp32. Both factors are exact in fp32, so only their product is rounded."""
    powers = ((123 - (steps // 16).int()) << 23).view(torch.float32)  # 2^(-4 - e), from the bits of its exponent
    return largest * ((16 + steps % 16).float() * powers)


def largest_step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The bf16 unit that steps are fractions of, large enough for the widest group: [..., groups] -> [...]."""
    widest = torch.maximum((high - low) / (2**bits - 1), _reaching(low, high, bits)).amax(dim=-1)
    return (widest * (WIDEST / 1.5)).clamp_min(TINY).to(torch.bfloat16)


def _reaching(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The least step with which a one-byte centre can represent the middle of each group, [...]."""
    return (high + low).abs() / 2 * (64 / 2**bits) / 126


def quantise(
    numbers: Tensor, valid: Tensor, low: Tensor, high: Tensor, largest: Tensor, bits: int, ranges: Sequence[float]
) -> Quantised:
    """Round groups of numbers. Tries some ranges and keeps, for each group, the one of least squared error.

    Args:
        numbers: fp32 [..., n].
        valid: which numbers are valid; broadcasts to [..., n].
        low: least valid number of each group, [...].
        high: greatest valid number of each group, [...].
        largest: result of `largest_step`, fp32; broadcasts over the groups.
        bits: bits of a code.
        ranges: ranges to try, as shares of a group's range, at most `WIDEST`.
    """
    best: Quantised | None = None
    least, reaching = torch.full_like(low, torch.inf), _reaching(low, high, bits)
    for share in ranges:
        steps = _step_bytes(torch.maximum((high - low) * (share / (2**bits - 1)), reaching), largest)
        step = step_of(steps, largest)
        unit = step * (2**bits / 64)
        centres = ((high + low) / 2 / unit).round().clamp(-128, 127).to(torch.int8)
        offset = (2**bits - 1) / 2 - centres.float() * (2**bits / 64)
        codes = (numbers / step[..., None] + offset[..., None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
        found = Quantised(codes, steps, centres)
        error = ((found.values(bits, largest) - numbers).square() * valid).sum(dim=-1)
        if best is None:
            best, least = found, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Quantised(
            torch.where(better[..., None], codes, best.codes), torch.where(better, steps, best.steps),
            torch.where(better, centres, best.centres),
        )  # fmt: skip
    assert best is not None
    return best


def _step_bytes(step: Tensor, largest: Tensor) -> Tensor:
    """Encode each step as a byte, rounded up. A step outside what a byte can represent gets the nearest byte."""
    ratio = (step / largest).clamp(2.0**-15, 31 / 16)
    exponent = torch.floor(torch.log2(ratio)).clamp(-15, 0)
    mantissa = torch.ceil(torch.ldexp(ratio, 4 - exponent.int())) - 16
    up = mantissa > 15  # the next power of two
    at_top = up & (exponent == 0)
    exponent = torch.where(up & ~at_top, exponent + 1, exponent)
    mantissa = torch.where(at_top, 15.0, torch.where(up, 0.0, mantissa)).clamp(0, 15)
    return (-exponent * 16 + mantissa).to(torch.uint8)
