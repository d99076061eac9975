"""The connector in the decode engine: it writes what arrives into the cache, compacted, and makes layers read that.

The packed bytes of a prompt stay on the host until its request is done: a request that is preempted and resumed gets
the same keys and values again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import NO_CODEC, Retention
from pdtrim_pl.serving.vllm.compaction import slots_of
from pdtrim_pl.serving.vllm.inbox import Inbox, Transfer
from pdtrim_pl.serving.vllm.layout import CacheLayout
from pdtrim_pl.serving.vllm.pair import ServedPair
from pdtrim_pl.wire.packing import DamagedBlock, unpacked

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """A request whose prompt is to be loaded."""

    request: str
    transfer: bytes
    """Empty if the request names none: it fails."""
    positions: int
    blocks: list[int]
    """The request's block table."""


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers."""

    loads: list[Load] = field(default_factory=list)
    bare: list[int] = field(default_factory=list)
    """First blocks of requests without transferred positions."""
    finished: list[str] = field(default_factory=list)


class DecodeScheduler:
    """Asks for every prompt but its last token from the prefill engine."""

    def __init__(self, pair: ServedPair) -> None:
        self.pair = pair
        self._next = Loads()

    def positions(self, request: Request) -> int:
        """Positions of a request that come from the prefill engine."""
        return self.pair.handled(request.num_prompt_tokens)

    def admit(self, request: Request, blocks: list[int], external: int) -> None:
        """Load a request's prompt into its blocks."""
        if not external:
            if not self.positions(request):
                self._next.bare.append(blocks[0])
            return
        params = request.kv_transfer_params or {}
        transfer = bytes.fromhex(params.get("transfer_id", "")) if self._fits(request, params) else b""
        self._next.loads.append(Load(request.request_id, transfer, external, blocks))

    def step(self, output: SchedulerOutput) -> Loads:
        """What was noted since the last step."""
        told, self._next = self._next, Loads()
        told.finished = list(output.finished_req_ids)
        return told

    def _fits(self, request: Request, params: Mapping[str, str]) -> bool:
        if params.get("pair", self.pair.manifest.id) != self.pair.manifest.id:
            log.error(
                "Request %s is of pair %s, and this engine serves %s: start both engines from copies of one export.",
                request.request_id, params["pair"][:12], self.pair.manifest.id[:12],
            )  # fmt: skip
            return False
        if "transfer_id" not in params:
            log.error(
                "Request %s names no transfer: the decode engine cannot encode a prompt. Send it to the prefill engine "
                "first.",
                request.request_id,
            )
            return False
        return True


class DecodeWorker:
    """Writes transfers into the cache and keeps the cuts of running requests.

    Args:
        pair: that the engine serves.
        caches: attention layer -> its cache.
        layers: attention layer -> its index in the model.
        layout: of the caches.
        inbox: filled by the receiver.
        block_size: slots of a block of the scheduler's tables.
    """

    def __init__(
        self, pair: ServedPair, caches: Mapping[str, Tensor], layers: Mapping[str, int], layout: CacheLayout,
        inbox: Inbox, block_size: int,
    ) -> None:  # fmt: skip
        self.pair, self.caches, self.layout, self.inbox, self.block_size = pair, caches, layout, inbox, block_size
        found = {name: pair.block(index) for name, index in layers.items()}
        self.blocks = {name: block for name, block in found.items() if block is not None}
        self.groups: dict[Retention, list[str]] = {}
        """What compacted layers keep -> the layers that keep it."""
        for name, block in self.blocks.items():
            if pair.rule(block).keep != "all":
                self.groups.setdefault(pair.rule(block).written_as(NO_CODEC), []).append(name)
        cache = next(iter(caches.values()))
        self.kernel_size = cache.shape[2]
        """Slots of a block of the attention kernel's tables."""
        self.cuts = {rule: torch.zeros(len(cache), dtype=torch.int32, device=cache.device) for rule in self.groups}
        """What a layer keeps -> cut of the request whose table begins with a block, by that block."""
        self.loaded_bytes = 0
        self._pending: dict[str, tuple[Load, float]] = {}
        self._transfers: dict[str, bytes] = {}
        self._first: dict[str, int] = {}
        self._owner: dict[int, str] = {}

    def begin(self, told: Loads) -> None:
        """Note the scheduler's message; before the forward pass."""
        for first in told.bare:
            self._set_cuts(first, 0, None)
        for load in told.loads:
            self._pending[load.request] = load, time.monotonic()
        for request in told.finished:
            self.inbox.drop(self._transfers.pop(request, b""))
            first = self._first.pop(request, -1)
            if self._owner.get(first) == request:
                self._set_cuts(first, 0, None)

    def finish(self) -> tuple[set[str], set[str]]:
        """Load what has arrived; after the forward pass.

        Returns:
            Requests whose wait is over, and those of them that failed.
        """
        over, failed = set(), set()
        for load, since in list(self._pending.values()):
            try:
                transfer = self._arrived(load, since)
                if transfer is None:
                    continue
                self._write(load, transfer)
            except (UserError, DamagedBlock) as error:
                log.error("The prompt of request %s cannot be loaded: %s", load.request, error)
                failed.add(load.request)
            over.add(load.request)
            del self._pending[load.request]
        return over, failed

    def _arrived(self, load: Load, since: float) -> Transfer | None:
        """The transfer of a request, or None while it is under way."""
        if not load.transfer:
            raise UserError("it names no transfer of this pair.")
        self._transfers[load.request] = load.transfer
        transfer = self.inbox.claim(load.transfer)
        if transfer is not None:
            if transfer.positions != load.positions:
                raise UserError(f"{transfer.positions} positions were sent, and the request has {load.positions}.")
            return transfer
        refusal = self.inbox.refusal
        if refusal is not None and refusal[0] > since - 1:
            raise UserError(refusal[1])
        if time.monotonic() - since > self.inbox.timeout:
            raise UserError(f"it did not arrive within {self.inbox.timeout:g} s (`--kv-timeout`).")
        return None

    @torch.inference_mode()
    def _write(self, load: Load, transfer: Transfer) -> None:
        table = torch.tensor(load.blocks)
        for name, block in self.blocks.items():
            cache, rule = self.caches[name], self.pair.rule(block)
            count = rule.kept(load.positions)
            heads, width = cache.shape[1], cache.shape[3] // 2
            data = torch.frombuffer(transfer.blocks[block], dtype=torch.uint8) if count else torch.empty(0)
            streams = unpacked(data.to(torch.uint8).to(cache.device), [count], rule.codec, heads, width, cache.dtype)
            keys, values = (stream.decoded()[0].transpose(0, 1) for stream in streams)  # [T, K, D]
            slots = slots_of(torch.arange(count), table, self.block_size).to(cache.device)
            self.layout.write(cache, slots, keys, values)
            if load.request not in self._first:  # else it was preempted, and nothing crosses again
                self.loaded_bytes += len(transfer.blocks[block])
        self._set_cuts(load.blocks[0], load.positions, load.request)

    def _set_cuts(self, first: int, positions: int, request: str | None) -> None:
        place = first * (self.block_size // self.kernel_size)
        for rule, cuts in self.cuts.items():
            cuts[place] = positions - rule.kept(positions)
        self._owner.pop(first, None)
        if request is not None:
            self._owner[first], self._first[request] = request, first
