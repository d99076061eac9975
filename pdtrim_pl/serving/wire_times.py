"""How long a prompt's keys and values take over a real socket, at the rates of several links."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from typing_extensions import override

from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.serving.engine.frames import FramedLink
from pdtrim_pl.serving.engine.handover import HandoverSender, receive_handover
from pdtrim_pl.staged import KVCache

CHUNK = 2**18
"""Bytes that are sent between two looks at the clock."""
LARGEST = 2**40
"""Bytes of one piece of data: no limit."""


@dataclass(frozen=True, eq=False)
class Cargo:
    """What is sent: a prompt's whole cache, under a plan and a policy."""

    cache: KVCache
    plan: StagePlan
    policy: KVRetentionPolicy


class PacedLink(FramedLink):
    """The sending end of a connection, no faster than a link.

    Args:
        connection: the connected socket.
        rate: of the link, Gbit/s.
    """

    def __init__(self, connection: socket.socket, rate: float) -> None:
        super().__init__(connection, b"", bytes(32), LARGEST)
        self._rate = rate * 1e9 / 8
        self._free = 0.0
        """When the link has sent everything that it was given."""

    @override
    def _write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._free = max(self._free, time.perf_counter()) + len(chunk) / self._rate
            super()._write(chunk)
            time.sleep(max(self._free - time.perf_counter(), 0.0))


def wire_seconds(cargo: Cargo, rate: float) -> float:
    """Seconds from a cache in prefill's memory to the cache in decode's; encoding and decoding are part of it.

    Args:
        cargo: what is sent.
        rate: of the link, Gbit/s. The sockets of this machine may be slower than a fast one.
    """
    device = cargo.cache.lengths.device
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        with ours, theirs, torch.inference_mode():
            far = FramedLink(theirs, b"", bytes(32), LARGEST)

            @torch.inference_mode()
            def received() -> float:
                far.next_request()
                receive_handover(far, cargo.plan, cargo.policy, device)
                return time.perf_counter()

            arrived = thread.submit(received)
            started = time.perf_counter()
            link = PacedLink(ours, rate)
            link.begin(1)
            with HandoverSender(link, cargo.plan, cargo.policy) as sender:
                sender.begin(cargo.cache.lengths)
                for block in cargo.plan.decode:
                    sender.send_block(block, cargo.cache.blocks[block])
                sender.end(torch.zeros_like(cargo.cache.lengths))
            return arrived.result() - started


def wire_times(
    cargoes: Mapping[str, Cargo], rates: Sequence[float], repeats: int
) -> dict[float, dict[str, list[float]]]:
    """Milliseconds of every repeat, by rate and name. All take turns; a first turn does not count."""
    found: dict[float, dict[str, list[float]]] = {rate: {name: [] for name in cargoes} for rate in rates}
    for turn in range(repeats + 1):
        for rate in rates:
            for name, cargo in cargoes.items():
                milliseconds = 1e3 * wire_seconds(cargo, rate)
                if turn > 0:
                    found[rate][name].append(milliseconds)
    return found
