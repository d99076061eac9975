"""What has arrived at a decode engine and waits for its request. No torch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.vllm.pair import ServedPair


@dataclass
class Transfer:
    """What has arrived of one prompt."""

    positions: int
    opened: float = field(default_factory=time.monotonic)
    blocks: dict[int, bytearray] = field(default_factory=dict)
    """Original block index -> packed bytes."""


class Inbox:
    """Transfers that have arrived, until their requests are done.

    Args:
        pair: that the decode engine serves.
        ranks: its tensor-parallel ranks.
        room: most bytes that are held; further transfers are refused.
        timeout: seconds after which a transfer that no request has claimed is deleted.
    """

    def __init__(self, pair: ServedPair, ranks: int, room: int, timeout: float) -> None:
        self.pair, self.ranks, self.room, self.timeout = pair, ranks, room, timeout
        self.refusal: tuple[float, str] | None = None
        """When and why a prefill engine was last turned away."""
        self._lock = threading.Lock()
        self._transfers: dict[bytes, Transfer] = {}
        self._claimed: set[bytes] = set()
        self._held = 0

    def open(self, transfer: bytes, positions: int) -> None:
        """Make room for a transfer.

        Raises:
            UserError: there is no room.
        """
        size = sum(self.pair.block_bytes(block, positions, self.ranks) for block in self.pair.plan.decode)
        with self._lock:
            self._forget(transfer)
            for old in [old for old, each in self._transfers.items() if self._expired(old, each)]:
                self._forget(old)
            if self._held + size > self.room:
                raise UserError(
                    f"A transfer of {size} bytes does not fit beside {self._held} bytes of others: the decode engine "
                    f"holds at most {self.room} (`--kv-room`)."
                )
            self._held += size
            self._transfers[transfer] = Transfer(positions)

    def block_size(self, transfer: bytes, block: int) -> int:
        """Bytes that the next block of a transfer must have.

        Raises:
            UserError: the transfer is not open, or the block is not one that it still lacks.
        """
        with self._lock:
            found = self._transfers.get(transfer)
            if found is None or not self.pair.crosses(block) or block in found.blocks:
                raise UserError(f"Block {block} of transfer {transfer.hex()} is not expected.")
            return self.pair.block_bytes(block, found.positions, self.ranks)

    def add(self, transfer: bytes, block: int, data: bytearray) -> None:
        """Keep the bytes of a block."""
        with self._lock:
            if transfer in self._transfers:
                self._transfers[transfer].blocks[block] = data

    def claim(self, transfer: bytes) -> Transfer | None:
        """The transfer, if all of it is there. It stays until `drop`, for a request may be preempted and resumed."""
        with self._lock:
            self._claimed.add(transfer)
            found = self._transfers.get(transfer)
            whole = found is not None and len(found.blocks) == len(self.pair.plan.decode)
            return found if whole else None

    def drop(self, transfer: bytes) -> None:
        """Delete a transfer: its request is done."""
        with self._lock:
            self._claimed.discard(transfer)
            self._forget(transfer)

    def _expired(self, transfer: bytes, found: Transfer) -> bool:
        return transfer not in self._claimed and time.monotonic() - found.opened > self.timeout

    def _forget(self, transfer: bytes) -> None:
        found = self._transfers.pop(transfer, None)
        if found is not None:
            blocks = self.pair.plan.decode
            self._held -= sum(self.pair.block_bytes(block, found.positions, self.ranks) for block in blocks)
