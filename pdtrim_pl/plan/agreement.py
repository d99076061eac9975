"""Two nodes agree that they hold the same pair, before a tensor crosses. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.manifest import PairManifest

Exchange = Callable[[bytes, int], bytes]
"""Sends a message to the other node and returns its answer, which must have the given number of bytes."""
LONGEST_MANIFEST = 2**26
"""Bytes. A manifest has about 150 bytes for each file of the export."""


def agree(exchange: Exchange, manifest: PairManifest) -> None:
    """Exchange ids with the other node, and manifests if the ids differ. Both nodes call it once, after connecting.

    Args:
        exchange: to the other node.
        manifest: of the export that this node has loaded.

    Raises:
        UserError: the other node holds another pair; the message names what differs.
    """
    if exchange(bytes.fromhex(manifest.id), 32) == bytes.fromhex(manifest.id):
        return
    content = json.dumps(manifest.to_json()).encode()
    size = int.from_bytes(exchange(len(content).to_bytes(8, "little"), 8), "little")
    if not 0 < size <= LONGEST_MANIFEST:
        raise UserError(f"The other worker announces a manifest of {size} bytes: it does not speak this protocol.")
    other = PairManifest.from_json(json.loads(exchange(content, size)))
    raise UserError(
        f"The workers hold different pairs, {manifest.id[:12]} here and {other.id[:12]} on the other side. What "
        f"differs: {', '.join(manifest.differences(other))}. Start both from copies of one export."
    )
