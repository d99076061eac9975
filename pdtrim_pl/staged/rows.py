"""What the host knows of padding. With it, no pass has to read a mask from the device.

Shapes: B batch, N entries of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RowCounts(NamedTuple):
    """Number of real tokens of each row. Prompts are padded on the left, responses on the right."""

    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @classmethod
    def of(cls, prompt_mask: Tensor, response_mask: Tensor) -> RowCounts | None:
        """Count the tokens of masks [B, P] and [B, R]; None if one is padded elsewhere, or not in host memory."""
        if prompt_mask.device.type != "cpu":
            return None
        prompts, responses = prompt_mask.sum(dim=1), response_mask.sum(dim=1)
        left = torch.arange(prompt_mask.shape[1]) >= prompt_mask.shape[1] - prompts[:, None]
        right = torch.arange(response_mask.shape[1]) < responses[:, None]
        if not (torch.equal(left, prompt_mask) and torch.equal(right, response_mask)):
            return None
        return cls(tuple(prompts.tolist()), tuple(responses.tolist()))

    @property
    def tokens(self) -> int:
        """Number of response tokens of the batch."""
        return sum(self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        return max(map(sum, zip(self.prompts, self.responses, strict=True)))

    def real_responses(self, width: int, device: torch.device) -> Tensor:
        """Indices of the response tokens in a batch whose rows of `width` entries are laid one after the other."""
        real = torch.arange(width) < torch.tensor(self.responses)[:, None]
        return _sent(real.flatten().nonzero()[:, 0], device)


@dataclass(frozen=True)
class Rows:
    """Where the valid entries of each row are, and at which positions."""

    valid: tuple[range | None, ...]
    """Indices of the valid entries; None if there is a gap between them."""
    positions: tuple[range, ...]
    """A range that holds the positions of all entries, padding included."""

    @classmethod
    def counted(cls, valid: Sequence[range | None]) -> Rows:
        """Rows whose valid entries have the positions 0, 1, 2 and so on."""
        return cls(tuple(valid), tuple(range(max(len(row or ()), 1)) for row in valid))

    def followed_by(self, others: Rows, entries: int) -> Rows:
        """These `entries` entries of each row, followed by others."""
        valid = tuple(_joined(*pair, entries) for pair in zip(self.valid, others.valid, strict=True))
        pairs = zip(self.positions, others.positions, strict=True)
        return Rows(valid, tuple(range(min(a.start, b.start), max(a.stop, b.stop)) for a, b in pairs))

    @property
    def are_whole(self) -> bool:
        """Whether every row has padding only after its last token."""
        return all(row is not None and (not row or row.start == 0) for row in self.valid)

    @property
    def have_no_gap(self) -> bool:
        """Whether every row has padding only before its first and after its last token."""
        return all(row is not None for row in self.valid)

    @property
    def starts(self) -> list[int]:
        """Number of padded entries before the first token of each row; 0 in a row without tokens."""
        return [row.start if row else 0 for row in self.valid]

    @property
    def counts(self) -> list[int]:
        """Number of valid entries of each row without a gap."""
        return [len(row or ()) for row in self.valid]

    def fit_into(self, window: int) -> bool:
        """Whether no window of so many positions cuts a row."""
        return all(len(row) <= window for row in self.positions)


def as_tensor(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers on a device, without waiting for it."""
    return _sent(torch.tensor(values), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _joined(first: range | None, second: range | None, entries: int) -> range | None:
    if first is None or second is None:
        return None
    if not second:
        return first
    if not first:
        return range(entries + second.start, entries + second.stop)
    whole = first.stop == entries and second.start == 0
    return range(first.start, entries + second.stop) if whole else None
