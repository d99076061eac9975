"""The first message between two workers: both must hold the same pair before a tensor of a request is sent."""

from __future__ import annotations

import torch

from pdtrim_pl.plan import PairManifest
from pdtrim_pl.plan.agreement import agree
from pdtrim_pl.serving.transport import Link


def agree_on_pair(link: Link, manifest: PairManifest) -> None:
    """Agree with the other worker that both hold the same pair. Both workers call it once, after connecting.

    Args:
        link: to the other worker.
        manifest: of the export that this worker has loaded.

    Raises:
        UserError: the other worker holds another pair; the message names what differs.
        LinkError: the other worker is gone.
    """

    def exchange(ours: bytes, size: int) -> bytes:
        """Prefill sends first, or both would wait."""
        message = torch.frombuffer(bytearray(ours), dtype=torch.uint8)
        if link.stage == "prefill":
            link.send(message)
        theirs = link.receive((size,), torch.uint8)
        if link.stage == "decode":
            link.send(message)
        return theirs.cpu().numpy().tobytes()

    agree(exchange, manifest)
