"""The connector in the prefill engine: it sends each block's kept positions as soon as the layer has them all."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from pdtrim_pl.serving.vllm.compaction import kept_positions, slots_of
from pdtrim_pl.serving.vllm.engine import progress_of, table_of
from pdtrim_pl.serving.vllm.greeting import Address
from pdtrim_pl.serving.vllm.layout import CacheLayout
from pdtrim_pl.serving.vllm.pair import ServedPair
from pdtrim_pl.serving.vllm.transfer import Sender
from pdtrim_pl.wire.codecs import encoded_keys, encoded_values
from pdtrim_pl.wire.packing import packed

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Save:
    """A prompt whose last handled position is computed in this step."""

    transfer: bytes
    target: Address
    positions: int
    blocks: list[int]
    """The request's block table."""


@dataclass
class Saves(KVConnectorMetadata):
    """What the scheduler tells the workers."""

    saves: list[Save] = field(default_factory=list)


class PrefillScheduler:
    """Finds the step in which a prompt is complete; chunks, cached prefixes and preemptions come before it.

    Args:
        pair: that the engine serves.
        target: where prompts go that name no other `target`.
    """

    def __init__(self, pair: ServedPair, target: Address) -> None:
        self.pair, self.target = pair, target
        self._waiting: dict[str, tuple[bytes, Address, int]] = {}
        self._transfers: dict[str, bytes] = {}

    def admit(self, request: Request) -> None:
        """Note a request that asks for a transfer (`do_remote_decode`)."""
        params = request.kv_transfer_params or {}
        positions = self.pair.handled(request.num_prompt_tokens)
        if not params.get("do_remote_decode") or positions < 1 or request.request_id in self._transfers:
            return
        transfer = uuid.UUID(hex=params["transfer_id"]) if "transfer_id" in params else uuid.uuid4()
        target = Address.of(params["target"]) if "target" in params else self.target
        self._transfers[request.request_id] = transfer.bytes
        self._waiting[request.request_id] = (transfer.bytes, target, positions)

    def step(self, output: SchedulerOutput) -> Saves:
        """The prompts that this step completes."""
        found = []
        for name, computed in progress_of(output).items():
            if name in self._waiting and computed >= self._waiting[name][2]:
                transfer, target, positions = self._waiting.pop(name)
                found.append(Save(transfer, target, positions, table_of(output, name)))
        return Saves(found)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """What the engine's answer says for the decode engine."""
        self._waiting.pop(request.request_id, None)
        transfer = self._transfers.pop(request.request_id, None)
        if transfer is None:
            return None
        return {"do_remote_prefill": True, "transfer_id": transfer.hex(), "pair": self.pair.manifest.id}


class PrefillWorker:
    """Reads, encodes and sends.

    Args:
        pair: that the engine serves.
        layers: attention layer -> its index in the model.
        layout: of the cache.
        sender: to decode engines.
        block_size: slots of a block of the scheduler's tables.
    """

    def __init__(
        self, pair: ServedPair, layers: dict[str, int], layout: CacheLayout, sender: Sender, block_size: int
    ) -> None:
        self.pair, self.layout, self.sender, self.block_size = pair, layout, sender, block_size
        found = {name: pair.block(index) for name, index in layers.items()}
        self.blocks = {name: block for name, block in found.items() if block is not None and pair.crosses(block)}
        """Attention layer -> original block, for those that cross."""
        self._opened: set[bytes] = set()

    @torch.inference_mode()
    def save(self, name: str, cache: Tensor, saves: Saves) -> None:
        """Send what a layer keeps of the prompts that are complete."""
        block = self.blocks.get(name)
        if block is None:
            return
        rule = self.pair.rule(block)
        for each in saves.saves:
            if each.transfer not in self._opened:
                self._opened.add(each.transfer)
                self.sender.open(each.target, each.transfer, each.positions)
            kept = kept_positions(rule, each.positions)
            table = torch.tensor(each.blocks)
            slots = slots_of(kept, table, self.block_size).to(cache.device)
            keys, values = (part.transpose(0, 1)[None] for part in self.layout.read(cache, slots))  # [1, K, T, D]
            counts = torch.tensor([len(kept)], device=cache.device)
            data = packed(
                encoded_keys(keys, counts, rule.codec), encoded_values(values, counts, rule.codec), [len(kept)]
            )
            self.sender.send(each.target, each.transfer, block, data.numel(), _content(data))

    def end(self, saves: Saves) -> None:
        """All layers of the step were saved."""
        self._opened -= {each.transfer for each in saves.saves}


def _content(data: Tensor) -> Callable[[], bytes]:
    """Bytes of a packed block, for the sending thread; a GPU's are copied there, when they are ready."""
    ready = None
    if data.device.type == "cuda":
        ready = torch.cuda.Event()
        ready.record()

    def content() -> bytes:
        if ready is not None:
            ready.synchronize()
        return data.cpu().numpy().tobytes()

    return content
