"""Guards: limits on the removals of every round."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_pl.errors import UserError


@dataclass(frozen=True)
class Guards:
    """Limits on the removals of every round."""

    protect_first: int = 1
    """Number of first blocks that are never removed."""
    protect_last: int = 1
    """Number of last blocks that are never removed."""
    max_removed: int | None = None
    """Maximum number of removed blocks in a stage; None for no limit."""

    def __post_init__(self) -> None:
        if self.protect_first < 0 or self.protect_last < 0 or (self.max_removed is not None and self.max_removed < 0):
            raise UserError(f"`guards` must not be negative, got {self}.")
