"""Messages between the engine and its workers. They are plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.sampling import Sampling

Address = tuple[str, int]


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start."""

    stage: Stage
    export: Path
    device: str
    host: str
    """Where decode listens for prefill."""
    key: bytes
    """Signs every header."""
    max_batch: int
    """Most requests that decode runs at once."""


@dataclass(frozen=True)
class Connect:
    """To prefill: connect to decode."""

    address: Address


@dataclass(frozen=True)
class Encode:
    """To prefill: encode a prompt and hand it over."""

    request: int
    prompt_ids: list[int]
    sampling: Sampling
    with_logits: bool
    """Hand over the logits of the first response token too."""


@dataclass(frozen=True)
class Expect:
    """To decode: a prompt will arrive; generate from it, or compute the logits of a known response."""

    request: int
    handled: int
    """Prompt tokens that prefill handles."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    forced: tuple[int, ...] | None
    """The known response; None to generate one."""


@dataclass(frozen=True)
class Forget:
    """To decode: nobody reads more tokens of a request."""

    request: int


@dataclass(frozen=True)
class Ready:
    """From both: the checkpoint is loaded. Decode says where it listens."""

    address: Address | None


@dataclass(frozen=True)
class Connected:
    """From prefill: it has a connection to the decode worker of the same pair."""


@dataclass(frozen=True)
class Encoded:
    """From prefill: a prompt was handed over."""

    request: int
    kv_bytes: int
    header_bytes: int
    seconds: float
    """Time of the prefill pass. Blocks are encoded and sent meanwhile."""
    transfer_seconds: float
    """Time from the end of the pass until the last byte was sent."""


@dataclass(frozen=True)
class Tokens:
    """From decode: one token of each of some requests."""

    tokens: list[tuple[int, int]]
    """Request and token id."""
    ended: list[int]
    """Requests of which this was the last token."""
    seconds: float | None
    """Time of the decode step; None for tokens that prefill chose."""


@dataclass(frozen=True)
class Logits:
    """From decode: the logits of a known response."""

    request: int
    values: Any
    """A float32 array [R, V]."""
    steps: int
    """Tokens that were fed to decode."""
    seconds: float


@dataclass(frozen=True)
class Lost:
    """From both: a request could not be handed over. The worker goes on."""

    request: int | None
    """None if the transfer did not say which one it is."""
    message: str


@dataclass(frozen=True)
class Failed:
    """From both: the worker fails and exits."""

    message: str
    setting: bool
    """Whether it is a user's mistake."""


Command = Connect | Encode | Expect | Forget
Report = Ready | Connected | Encoded | Tokens | Logits | Lost | Failed
