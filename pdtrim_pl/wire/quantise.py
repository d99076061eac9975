"""Asymmetric rounding of groups of numbers to a few bits, with a step and a centre of one byte each.

A number is `step * (code - (2**b - 1) / 2 + centre * 2**b / 64)`. A step is `largest * (16 + m) * 2**(-4 - e)` with
`m = byte % 16` and `e = byte // 16`, at most `largest * 31 / 16`. A centre is a signed byte, in 64ths of the range
of codes.

Shapes: the last dimension is a group; every other one is a group of its own. `largest` broadcasts over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 1.2
"""Of the ranges that an encoder may try, as a share of a group's own."""
TINY = 2.0**-100


@dataclass(frozen=True, eq=False)
class Quantised:
    """Groups of codes. All bytes are uint8 but centres, which are int8."""

    codes: Tensor
    """[..., n]."""
    steps: Tensor
    """[...]."""
    centres: Tensor
    """[...]."""

    def values(self, bits: int, largest: Tensor) -> Tensor:
        """The numbers that the codes stand for, fp32 [..., n].

        Args:
            bits: of a code.
            largest: fp32, broadcasts over the groups [...].
        """
        offset = self.centres.float() * (2**bits / 64) - (2**bits - 1) / 2
        return (self.codes.float() + offset[..., None]) * step_of(self.steps, largest)[..., None]


def step_of(steps: Tensor, largest: Tensor) -> Tensor:
    """Steps in fp32 from their bytes; both factors are exact, so one rounding is left."""
    powers = ((123 - (steps // 16).int()) << 23).view(torch.float32)  # 2^(-4 - e), by its exponent's bits
    return largest * ((16 + steps % 16).float() * powers)


def largest_step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """A bf16 number of which every step is a fraction: the step of the widest group [..., groups] over its last dim."""
    widest = torch.maximum((high - low) / (2**bits - 1), _reaching(low, high, bits)).amax(dim=-1)
    return (widest * (WIDEST / 1.5)).clamp_min(TINY).to(torch.bfloat16)


def _reaching(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The least step with which a centre of one byte reaches the middle of a group, [...]."""
    return (high + low).abs() / 2 * (64 / 2**bits) / 126


def quantise(
    numbers: Tensor, valid: Tensor, low: Tensor, high: Tensor, largest: Tensor, bits: int, ranges: Sequence[float]
) -> Quantised:
    """Round groups of numbers, trying several ranges and keeping that of the least squared error.

    Args:
        numbers: fp32 [..., n].
        valid: which of them count, broadcasts to [..., n].
        low: least valid number of each group, [...].
        high: greatest, [...].
        largest: from `largest_step`, fp32, broadcasts over the groups.
        bits: of a code.
        ranges: that are tried, as shares of a group's own, at most `WIDEST`.
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
    """The byte of the least step that is not below `step`; the greatest or the least there is where none is."""
    ratio = (step / largest).clamp(2.0**-15, 31 / 16)
    exponent = torch.floor(torch.log2(ratio)).clamp(-15, 0)
    mantissa = torch.ceil(torch.ldexp(ratio, 4 - exponent.int())) - 16
    up = mantissa > 15  # the next power of two
    at_top = up & (exponent == 0)
    exponent = torch.where(up & ~at_top, exponent + 1, exponent)
    mantissa = torch.where(at_top, 15.0, torch.where(up, 0.0, mantissa)).clamp(0, 15)
    return (-exponent * 16 + mantissa).to(torch.uint8)
