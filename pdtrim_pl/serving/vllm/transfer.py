"""The bytes of a prompt from a prefill engine to a decode engine, over TCP. Each pair of ranks has a connection.

Connections are those of `multiprocessing.connection`: framed messages, and a mutual HMAC challenge if there is a
secret. Before the first transfer both sides exchange `Hello` and the id of the pair. A transfer is a header that opens
it, then a header and the packed bytes of every block of D, as soon as prefill has saved it. The receiver knows the size
of each block from the policy, and refuses another one before it reads it.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.vllm.greeting import Address, Hello, greet, secret_for
from pdtrim_pl.serving.vllm.inbox import Inbox
from pdtrim_pl.serving.vllm.pair import ServedPair

log = logging.getLogger(__name__)

HEADER = struct.Struct("<4s16sIIQ")
"""Magic, transfer, kind, block, size. `size` is a number of positions under OPEN, and of bytes under BLOCK."""
MAGIC = b"pdKV"
OPEN, BLOCK = 1, 2
BROKEN = (OSError, EOFError, AuthenticationError)
"""What a connection raises when the other side is gone or has another secret."""


class Receiver:
    """Listens for prefill engines and fills an inbox. Its threads end with the process."""

    def __init__(self, address: Address, hello: Hello, inbox: Inbox) -> None:
        self.hello, self.inbox = hello, inbox
        port = address.port + hello.rank
        try:
            self._listener = Listener((address.host, port), backlog=16, authkey=secret_for(address.host))
        except OSError as error:
            raise UserError(f"{address.host}:{port} cannot be listened on ({error}): give another `--kv`.") from error
        threading.Thread(target=self._accept, name="kv listen", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (EOFError, ConnectionError, AuthenticationError) as error:
                log.warning("A connection was refused: %s: %s", type(error).__name__, error)
                continue
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), name="kv receive", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            with connection:
                greet(connection, self.hello, self.inbox.pair, first=False)
                while True:
                    self._receive(connection)
        except EOFError:
            return
        except (OSError, ValueError) as error:
            self.inbox.refusal = time.monotonic(), str(error)
            log.error("A prefill engine was turned away: %s", error)

    def _receive(self, connection: Connection) -> None:
        data = connection.recv_bytes(HEADER.size)
        if len(data) != HEADER.size:
            raise UserError(f"A header has {len(data)} bytes, not {HEADER.size}.")
        magic, transfer, kind, block, size = HEADER.unpack(data)
        if magic != MAGIC or kind not in (OPEN, BLOCK):
            raise UserError(f"A header begins with {magic!r} and has kind {kind}: it is not of this protocol.")
        if kind == OPEN:
            self.inbox.open(transfer, size)
            return
        expected = self.inbox.block_size(transfer, block)
        if size != expected:
            raise UserError(f"Block {block} is announced with {size} bytes, and the policy gives it {expected}.")
        content = bytearray(connection.recv_bytes(size) if size else b"")
        if len(content) != size:
            raise UserError(f"Block {block} has {len(content)} bytes, and {size} were announced.")
        self.inbox.add(transfer, block, content)


class Sender:
    """Sends blocks to decode engines, in the order in which they are given. Each decode engine has a thread."""

    def __init__(self, hello: Hello, pair: ServedPair) -> None:
        self.hello, self.pair = hello, pair
        self.sent = 0
        """Bytes of keys and values that were sent."""
        self._queues: dict[Address, queue.SimpleQueue[tuple[bytes, Callable[[], bytes] | None]]] = {}

    def open(self, target: Address, transfer: bytes, positions: int) -> None:
        """Begin a transfer."""
        self._put(target, HEADER.pack(MAGIC, transfer, OPEN, 0, positions), None)

    def send(self, target: Address, transfer: bytes, block: int, size: int, content: Callable[[], bytes]) -> None:
        """Send a block. `content` is called in the thread; it waits for the GPU if there is one."""
        self._put(target, HEADER.pack(MAGIC, transfer, BLOCK, block, size), content)

    def _put(self, target: Address, header: bytes, content: Callable[[], bytes] | None) -> None:
        if target not in self._queues:
            self._queues[target] = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(target,), name="kv send", daemon=True).start()
        self._queues[target].put((header, content))

    def _run(self, target: Address) -> None:
        connection: Connection | None = None
        failed = b""
        """The transfer that failed: its other blocks are not sent."""
        while True:
            header, content = self._queues[target].get()
            transfer, kind = HEADER.unpack(header)[1:3]
            if transfer == failed and kind != OPEN:
                continue
            try:
                connection = connection or self._connect(target)
                connection.send_bytes(header)
                if content is not None and (data := content()):
                    connection.send_bytes(data)
                    self.sent += len(data)
            except (*BROKEN, UserError) as error:
                log.error("Transfer %s to %s failed: %s: %s", transfer.hex(), target, type(error).__name__, error)
                failed, connection = transfer, None

    def _connect(self, target: Address) -> Connection:
        connection = Client((target.host, target.port + self.hello.rank), authkey=secret_for(target.host))
        assert isinstance(connection, Connection)
        # Else the last bytes of a transfer wait for an acknowledgement.
        with socket.socket(fileno=os.dup(connection.fileno())) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greet(connection, self.hello, self.pair, first=True)
        return connection
