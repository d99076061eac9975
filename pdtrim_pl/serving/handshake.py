"""The first message between two workers: both must hold the same pair before a tensor of a request is sent."""

from __future__ import annotations

import json

import torch

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.transport import Link

LONGEST_MANIFEST = 2**26
"""Bytes. A manifest has about 150 bytes for each file of the export."""


def agree_on_pair(link: Link, manifest: PairManifest) -> None:
    """Exchange ids with the other worker, and manifests if the ids differ. Both workers call it once, after connecting.

    Args:
        link: to the other worker.
        manifest: of the export that this worker has loaded.

    Raises:
        UserError: the other worker holds another pair; the message names what differs.
        LinkError: the other worker is gone.
    """
    theirs = _exchange(link, bytes.fromhex(manifest.id), 32)
    if theirs == bytes.fromhex(manifest.id):
        return
    content = json.dumps(manifest.to_json()).encode()
    size = int.from_bytes(_exchange(link, len(content).to_bytes(8, "little"), 8), "little")
    if not 0 < size <= LONGEST_MANIFEST:
        raise UserError(f"The other worker announces a manifest of {size} bytes: it does not speak this protocol.")
    other = PairManifest.from_json(json.loads(_exchange(link, content, size)))
    raise UserError(
        f"The workers hold different pairs, {manifest.id[:12]} here and {other.id[:12]} on the other side. What "
        f"differs: {', '.join(manifest.differences(other))}. Start both from copies of one export."
    )


def _exchange(link: Link, ours: bytes, size: int) -> bytes:
    """Send `ours` and receive `size` bytes. Prefill sends first, or both would wait."""
    message = torch.frombuffer(bytearray(ours), dtype=torch.uint8)
    if link.stage == "prefill":
        link.send(message)
    theirs = link.receive((size,), torch.uint8)
    if link.stage == "decode":
        link.send(message)
    return theirs.cpu().numpy().tobytes()
