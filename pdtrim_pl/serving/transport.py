"""The handover of a prompt from the prefill worker to the decode worker, over torch.distributed.

Only real entries cross, no padding. Their positions follow from the rows' lengths, the policy and the plan, which both
workers have.

Shapes: B batch, E entries of all rows together, N entries of the longest row, K key/value heads, D head dimension,
V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.plan import NO_CODEC, STAGES, KVRetentionPolicy, Retention, Stage, StagePlan
from pdtrim_pl.staged.cache import BlockKV, KVCache, Slots, keeper
from pdtrim_pl.wire.packing import unpacked

RANKS: dict[Stage, int] = {"prefill": 0, "decode": 1}


class LinkError(RuntimeError):
    """The other worker cannot be reached."""


@dataclass(frozen=True, eq=False)
class Handover:
    """Everything that decode gets of a prompt."""

    cache: KVCache
    """On its way out the prompt's whole cache, as prefill made it; at decode what crossed."""
    tokens: Tensor
    """Decode's first input, [B]: the response's first token, or the prompt's last one under `boundary: decode`."""
    logits: Tensor | None = None
    """Logits of the response's first token [B, V], if they were asked for (`boundary: prefill`)."""


@dataclass(frozen=True)
class Traffic:
    """What one handover put on the wire."""

    kv_bytes: int
    header_bytes: int
    """Lengths, first tokens and, if asked for, logits."""
    seconds: float
    """From the first byte to the last."""


@dataclass(frozen=True, eq=False)
class Link:
    """A worker's end of the wire."""

    group: dist.ProcessGroup
    stage: Stage
    device: torch.device
    """Where a tensor must lie to be sent: the CPU for gloo, the worker's own GPU for nccl."""

    @property
    def peer(self) -> int:
        """Rank of the other worker."""
        return 1 - RANKS[self.stage]

    def send(self, tensor: Tensor) -> int:
        """Send a tensor and return its bytes."""
        raw = tensor.to(self.device).contiguous().view(-1).view(torch.uint8)
        if raw.numel():
            try:
                self.group.send([raw], self.peer, 0).wait()
            except RuntimeError as error:
                raise LinkError(f"Sending to the other worker failed: {error}") from error
        return raw.numel()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receive a tensor of known shape, on `self.device`."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if tensor.numel():
            try:
                self.group.recv([tensor.view(-1).view(torch.uint8)], self.peer, 0).wait()
            except RuntimeError as error:
                raise LinkError(f"Receiving from the other worker failed: {error}") from error
        return tensor


def open_link(stage: Stage, device: torch.device, backend: str, meeting_point: Path, timeout: timedelta) -> Link:
    """Connect to the other worker; returns when both are ready.

    Args:
        stage: which end of the wire this is.
        device: the worker's device.
        backend: `gloo`, or `nccl` if each worker has its own GPU.
        meeting_point: a file that does not exist yet, the same for both workers.
        timeout: how long to wait for the other worker, now and in every transfer.

    Raises:
        LinkError: the other worker did not connect.
    """
    try:
        dist.init_process_group(
            backend,
            init_method=meeting_point.as_uri(),
            rank=RANKS[stage],
            world_size=len(STAGES),
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:
        raise LinkError(f"The workers did not find each other: {error}") from error
    assert dist.group.WORLD is not None
    return Link(dist.group.WORLD, stage, device if backend == "nccl" else torch.device("cpu"))


def send_handover(link: Link, handover: Handover, plan: StagePlan, policy: KVRetentionPolicy) -> Traffic:
    """Send a handover; the other side calls `receive_handover` with the same plan and policy.

    Args:
        link: to the decode worker.
        handover: with the whole cache.
        plan: says which blocks cross.
        policy: says which of their entries.
    """
    started = time.perf_counter()
    vocabulary = 0 if handover.logits is None else handover.logits.shape[-1]
    header = link.send(torch.tensor([len(handover.tokens), vocabulary]))
    header += link.send(torch.stack([handover.cache.lengths, handover.tokens]).to(torch.int64))
    kv_bytes, keep = 0, keeper()
    # One message per block: so few cost nothing beside the bytes, and packing copies one block at a time.
    for index in plan.decode:
        block, rule = handover.cache.blocks[index], policy.rule(index)
        assert block.keys.dtype == wire_dtype(policy)
        kv_bytes += link.send(keep(block, rule).packed(rule.codec))
    if handover.logits is not None:
        header += link.send(handover.logits.float())
    settle(link.device)
    return Traffic(kv_bytes, header, time.perf_counter() - started)


def receive_handover(
    link: Link, plan: StagePlan, policy: KVRetentionPolicy, device: torch.device
) -> tuple[Handover, Traffic]:
    """Receive what `send_handover` sent, onto `device`. Rows come left-justified, without the prompt's padding."""
    rows, vocabulary = link.receive((2,), torch.int64).tolist()
    started = time.perf_counter()  # before this, decode waited for prefill
    lengths, tokens = link.receive((2, rows), torch.int64).unbind()
    header = (2 + 2 * rows) * lengths.element_size()
    kv_bytes = 0
    slots: dict[Retention, Slots] = {}
    blocks: dict[int, BlockKV] = {}
    handled = lengths.tolist()
    heads, width, dtype = policy.kv.num_key_value_heads, policy.kv.head_dim, wire_dtype(policy)
    for index in plan.decode:
        rule = policy.rule(index)
        positions = rule.written_as(NO_CODEC)
        if positions not in slots:
            slots[positions] = _slots(rule, handled, device)
        size = sum(policy.block_bytes(index, length) for length in handled)
        data = link.receive((size,), torch.uint8).to(device)
        kv_bytes += data.nbytes
        counts = [rule.kept(length) for length in handled]
        keys, values = unpacked(data, counts, rule.codec, heads, width, dtype)
        blocks[index] = BlockKV(keys.decoded().to(dtype), values.decoded().to(dtype), slots[positions])
    logits = None
    if vocabulary:
        logits = link.receive((rows, vocabulary), torch.float32)
        header += logits.nbytes
        logits = logits.to(device)
    settle(device)
    handover = Handover(KVCache(blocks, lengths.to(device)), tokens.to(device), logits)
    return handover, Traffic(kv_bytes, header, time.perf_counter() - started)


def wire_dtype(policy: KVRetentionPolicy) -> torch.dtype:
    """Element type of keys and values on the wire: the cache's own."""
    return TORCH_DTYPES[policy.kv.dtype]


def settle(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that times are right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slots(rule: Retention, lengths: list[int], device: torch.device) -> Slots:
    """Positions of the entries that `rule` keeps of each row, left-justified, [B, N]."""
    first, last = torch.tensor([rule.counts(length) for length in lengths], device=device).unsqueeze(-1).unbind(dim=1)
    place = torch.arange(int((first + last).max()), device=device)[None]
    ends = torch.tensor(lengths, device=device)[:, None]
    valid = place < first + last
    positions = torch.where(place < first, place, ends - last + place - first)
    return Slots(positions.masked_fill(~valid, 0), valid)
