"""Frames between the two workers: a checked header before every piece of data.

A header says what follows, for which request, in which place, and how long it is. It is signed with a key that both
workers share, so neither a foreign program nor a damaged byte is taken for a transfer. A receiver knows the size of
what comes next and refuses every other one before it reads the data.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.hosts import SECRET_VARIABLE, is_loopback

MAGIC, VERSION = b"PDTK", 1
FIELDS = struct.Struct("<4sHHQIIQ32s")
"""Magic, version, kind, request, place, CRC-32 of the data, bytes of the data, id of the pair."""
SIGNATURE = hashlib.sha256().digest_size
HEADER = FIELDS.size + SIGNATURE
"""Bytes of a header."""
KINDS: dict[str, int] = {"hello": 1, "begin": 2, "data": 3}
Kind = Literal["hello", "begin", "data"]
SILENCE = 60.0
"""Seconds without a byte after which a transfer that has begun is given up."""


class LinkError(RuntimeError):
    """The other worker cannot be reached."""


class TransferRefused(LinkError):
    """A transfer that is damaged, cut short, too large, or of another pair. Its connection is closed."""


@dataclass(frozen=True)
class Header:
    """What a header says of the data behind it."""

    kind: Kind
    request: int
    place: int
    """Number of the frame within its request."""
    size: int
    crc: int
    pair: bytes
    """Id of the pair, 32 bytes."""

    def packed(self, key: bytes) -> bytes:
        """The header as bytes, signed with a key."""
        fields = FIELDS.pack(
            MAGIC, VERSION, KINDS[self.kind], self.request, self.place, self.crc, self.size, self.pair
        )  # fmt: skip
        return fields + hmac.digest(key, fields, "sha256")

    @classmethod
    def parse(cls, raw: bytes, key: bytes) -> Header:
        """Read a header.

        Raises:
            TransferRefused: it is none, it is of another version, or it was not signed with this key.
        """
        if len(raw) != HEADER:
            raise TransferRefused(f"The transfer was cut short: {len(raw)} of {HEADER} bytes of a header.")
        fields, signature = raw[: FIELDS.size], raw[FIELDS.size :]
        magic, version, kind, request, place, crc, size, pair = FIELDS.unpack(fields)
        if magic != MAGIC:
            raise TransferRefused(f"The transfer does not begin with {MAGIC!r}: it is not of this program.")
        if version != VERSION:
            raise TransferRefused(f"The transfer has version {version}, and this worker speaks {VERSION}.")
        if not hmac.compare_digest(signature, hmac.digest(key, fields, "sha256")):
            raise TransferRefused("The header is not signed with the shared secret, or was damaged on its way.")
        names = [name for name, number in KINDS.items() if number == kind]
        if not names:
            raise TransferRefused(f"The transfer is of unknown kind {kind}.")
        return cls(names[0], request, place, size, crc, pair)  # type: ignore[arg-type]


class FramedLink:
    """A worker's end of a connection. `HandoverSender` and `receive_handover` use it as their link.

    Args:
        connection: the connected socket.
        key: the shared secret.
        pair: id of the pair, 32 bytes.
        largest: most bytes of one piece of data.
    """

    def __init__(self, connection: socket.socket, key: bytes, pair: bytes, largest: int) -> None:
        self.connection, self.key, self.pair, self.largest = connection, key, pair, largest
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request, self._place = 0, 0

    @property
    def framing_bytes(self) -> int:
        """Bytes of the frames' own headers that the request on its way has had so far."""
        return self._place * HEADER

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def hello(self, message: bytes, size: int, *, first: bool) -> bytes:
        """Exchange messages with the other side, before the first request.

        Args:
            message: ours.
            size: bytes that theirs must have.
            first: whether to speak first. Who listens does not: a stranger gets no answer.

        Raises:
            LinkError: the other side does not answer as it should.
        """
        if first:
            self._send("hello", message)
        theirs = self._receive("hello", size, own_pair=False)
        if not first:
            self._send("hello", message)
        return theirs

    def begin(self, request: int) -> None:
        """Announce the data of a request."""
        self._request, self._place = request, 0
        self._send("begin", b"")

    def next_request(self) -> int:
        """Wait for the data of a request, however long; returns which one."""
        self.connection.settimeout(None)
        raw = self._bytes(HEADER)
        if not raw:
            raise LinkError("The other worker has closed the connection.")
        header = Header.parse(raw, self.key)
        self._check(header, "begin", 0, own_pair=True)
        self._request, self._place = header.request, 1
        return self._request

    def send(self, tensor: Tensor) -> int:
        """Send a tensor and return its bytes."""
        raw = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        if raw.numel():
            self._send("data", raw.numpy().data)
        return raw.numel()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receive a tensor of known shape."""
        tensor, count = torch.empty(0, dtype=dtype), torch.Size(shape).numel()
        if min(shape) < 0 or count * dtype.itemsize > self.largest:
            raise TransferRefused(f"The transfer announces a tensor {shape}, more than a request of this pair has.")
        if count:
            data = self._receive("data", count * dtype.itemsize, own_pair=True)
            tensor = torch.frombuffer(bytearray(data), dtype=dtype)
        return tensor.view(shape)

    def _send(self, kind: Kind, data: bytes | memoryview) -> None:
        header = Header(kind, self._request, self._place, len(data), zlib.crc32(data), self.pair)
        self._place += 1
        try:
            self._write(header.packed(self.key))
            self._write(data)
        except OSError as error:
            raise LinkError(f"Sending to the other worker failed: {error}") from error

    def _write(self, data: bytes | memoryview) -> None:
        self.connection.sendall(data)

    def _receive(self, kind: Kind, size: int | None, *, own_pair: bool) -> bytes:
        self.connection.settimeout(SILENCE)
        header = Header.parse(self._bytes(HEADER), self.key)
        self._check(header, kind, size, own_pair=own_pair)
        data = self._bytes(header.size)
        if len(data) != header.size or zlib.crc32(data) != header.crc:
            raise TransferRefused(f"The data was damaged or cut short: {len(data):,} of {header.size:,} bytes.")
        self._place += 1
        return data

    def _check(self, header: Header, kind: Kind, size: int | None, *, own_pair: bool) -> None:
        if own_pair and header.pair != self.pair:
            raise TransferRefused(
                f"The transfer is of pair {header.pair.hex()[:12]}, and this worker has {self.pair.hex()[:12]}."
            )
        if header.kind != kind:
            raise TransferRefused(f"The transfer has a {header.kind} where a {kind} belongs.")
        if kind == "data" and (header.request, header.place) != (self._request, self._place):
            raise TransferRefused(
                f"The transfer has piece {header.place} of request {header.request} where piece {self._place} of "
                f"{self._request} belongs."
            )
        if header.size > self.largest or (size is not None and header.size != size):
            raise TransferRefused(f"The transfer has {header.size:,} bytes where {size or self.largest:,} belong.")

    def _bytes(self, size: int) -> bytes:
        """Up to `size` bytes; fewer if the other side ends the connection."""
        data = bytearray(size)
        view, filled = memoryview(data), 0
        try:
            while filled < size and (count := self.connection.recv_into(view[filled:])):
                filled += count
        except OSError as error:
            raise LinkError(f"Receiving from the other worker failed: {error}") from error
        return bytes(view[:filled])


def check_host(host: str, secret: str | None) -> None:
    """Refuse to listen beyond this machine without a shared secret.

    Raises:
        UserError: another host could connect, and there is no secret.
    """
    if not is_loopback(host) and not secret:
        raise UserError(
            f"`host` is {host!r}, which other machines can reach: set {SECRET_VARIABLE} to a shared secret, or listen "
            "on 127.0.0.1."
        )
