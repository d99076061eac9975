"""How two engines meet: the address, the shared secret, and what both must have in common. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.agreement import agree
from pdtrim_pl.serving.hosts import SECRET_VARIABLE, is_loopback, shared_secret
from pdtrim_pl.serving.vllm.pair import ServedPair

PROTOCOL = "pdtrim.kv_stream/1"
LONGEST_HELLO = 4096


@dataclass(frozen=True)
class Hello:
    """What both sides must have in common, beside the pair."""

    protocol: str
    ranks: int
    """Tensor-parallel ranks of the engine."""
    rank: int


@dataclass(frozen=True)
class Address:
    """Where the first rank of a decode engine listens; the others use the ports behind it."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Address:
        """Read `HOST:PORT`.

        Raises:
            UserError: it is not that.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"The address of the decode engine's KV is {text!r}: give HOST:PORT.")
        return cls(host, int(port))


def secret_for(host: str) -> bytes | None:
    """The shared secret; None on this machine's own addresses if there is none.

    Raises:
        UserError: the address is open to others, and there is no secret.
    """
    secret = shared_secret()
    if secret is not None:
        return secret.encode()
    if not is_loopback(host):
        raise UserError(
            f"`{host}` is open to other machines: give both engines the same secret in the environment variable "
            f"{SECRET_VARIABLE}, or use 127.0.0.1."
        )
    return None


def greet(connection: Connection, hello: Hello, pair: ServedPair, *, first: bool) -> None:
    """Exchange `Hello` and the pair's id with the other side.

    Args:
        connection: to the other side.
        hello: our own.
        pair: that this engine serves.
        first: whether this side speaks first; the prefill engine does.

    Raises:
        UserError: the other side differs; the message says in what.
    """

    def exchange(ours: bytes, longest: int) -> bytes:
        if first:
            connection.send_bytes(ours)
        theirs = connection.recv_bytes(longest)
        if not first:
            connection.send_bytes(ours)
        return theirs

    theirs = json.loads(exchange(json.dumps(asdict(hello)).encode(), LONGEST_HELLO))
    if theirs != asdict(hello):
        raise UserError(
            f"The other engine says {theirs}, and this one {asdict(hello)}. Both need the same version of pdtrim_pl "
            "and the same `--tensor-parallel-size`."
        )
    agree(exchange, pair.manifest)
