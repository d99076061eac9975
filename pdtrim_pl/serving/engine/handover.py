"""The handover of a prompt from the prefill worker to the decode worker, block by block.

Only real entries cross, no padding. Their positions follow from the rows' lengths, the policy and the plan, which both
workers have.

Shapes: B batch, E entries of all rows together, N entries of the longest row, K key/value heads, D head dimension,
V vocabulary.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.plan import NO_CODEC, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.serving.engine.frames import FramedLink
from pdtrim_pl.staged.cache import BlockKV, KVCache, Slots, keeper
from pdtrim_pl.wire.packing import unpacked


@dataclass(frozen=True, eq=False)
class Handover:
    """Everything that decode gets of a prompt."""

    cache: KVCache
    """What crossed, without the padding of the prompts."""
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
    """Of the sender: time that the transfer took after prefill was done. Of the receiver: from first to last byte."""


class HandoverSender:
    """Sends a handover while prefill still runs: a thread encodes and sends each block as soon as it is there.

    Use it as a context manager around `begin`, `send_block` for every block of D in order, and `end`; the other side
    calls `receive_handover` with the same plan and policy. After an error nothing more is sent: the receiver would take
    the next block for the one that failed. The `with` block leaves no thread behind.

    Args:
        link: to the decode worker.
        plan: says which blocks cross.
        policy: says which entries of a block cross, and how they are encoded.
    """

    def __init__(self, link: FramedLink, plan: StagePlan, policy: KVRetentionPolicy) -> None:
        self.link, self.plan, self.policy = link, plan, policy
        self._keep = keeper()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="send")
        self._blocks: list[Future[int]] = []
        self._header = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def begin(self, lengths: Tensor) -> None:
        """Send the number of prompt tokens that prefill handles, of every row, [B]."""
        self._header += self.link.send(torch.tensor([len(lengths)]))
        self._header += self.link.send(lengths.to(torch.int64))

    def send_block(self, index: int, block: BlockKV) -> None:
        """Send the next block of D. Returns at once; `end` raises what goes wrong.

        Args:
            index: original index of the block.
            block: keys and values of the whole prompt.
        """
        assert index == self.plan.decode[len(self._blocks)]
        assert block.keys.dtype == wire_dtype(self.policy)
        self._blocks.append(self._thread.submit(self._send_block, self.policy.rule(index), block))

    @torch.inference_mode()  # of this thread
    def _send_block(self, rule: Retention, block: BlockKV) -> int:
        if any(sent.done() and sent.exception() is not None for sent in self._blocks):
            return 0  # `end` raises the error of the block that failed
        return self.link.send(self._keep(block, rule).packed(rule.codec))

    def end(self, tokens: Tensor, logits: Tensor | None = None) -> Traffic:
        """Wait until all blocks are sent, then send the rest.

        Args:
            tokens: first input of decode, see `Handover`, [B].
            logits: of the first token of the response, [B, V], if they were asked for.

        Raises:
            LinkError: the decode worker is gone.
        """
        started = time.perf_counter()
        kv_bytes = sum(block.result() for block in self._blocks)
        vocabulary = 0 if logits is None else logits.shape[-1]
        first = tokens.to(torch.int64).clone(memory_format=torch.contiguous_format)  # a column of the prompts
        header = self._header + self.link.send(torch.tensor([vocabulary])) + self.link.send(first)
        if logits is not None:
            header += self.link.send(logits.float())
        return Traffic(kv_bytes, header, time.perf_counter() - started)


def receive_handover(
    link: FramedLink, plan: StagePlan, policy: KVRetentionPolicy, device: torch.device
) -> tuple[Handover, Traffic]:
    """Receive what a `HandoverSender` sent, onto `device`. Rows come left-justified, without the prompt's padding."""
    (rows,) = link.receive((1,), torch.int64).tolist()
    started = time.perf_counter()  # before this, decode waited for prefill
    lengths = link.receive((rows,), torch.int64)
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
    (vocabulary,) = link.receive((1,), torch.int64).tolist()
    tokens, logits = link.receive((rows,), torch.int64), None
    header = (2 + 2 * rows) * tokens.element_size()
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
