"""What no round of removals may do."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_pl.errors import UserError


@dataclass(frozen=True)
class Guards:
    """Limits on every round."""

    protect_first: int = 1
    """So many of the first blocks are never dropped."""
    protect_last: int = 1
    """So many of the last blocks are never dropped."""
    max_removed: int | None = None
    """At most so many blocks may be gone from a stage; None sets no cap."""

    def __post_init__(self) -> None:
        if self.protect_first < 0 or self.protect_last < 0 or (self.max_removed is not None and self.max_removed < 0):
            raise UserError(f"`guards` must not be negative, got {self}.")
